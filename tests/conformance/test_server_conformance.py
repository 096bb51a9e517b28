"""The server backbone keeps every rule of the protocol, over memory and over real sockets."""

from support.fake_server import FakeModel, MemoryServer, SocketServer

from recollect.backbones.conformance import check_backbone
from recollect.backbones.protocol import ConcurrentBackbone
from recollect.backbones.server import ServerBackbone


def test_server_backbone_conforms():
    with ServerBackbone("http://one", transport=MemoryServer(FakeModel(), delay=0.0)) as server:
        assert isinstance(server, ConcurrentBackbone)
        check_backbone(server, tolerance=1e-9)


def test_server_backbone_conforms_over_sockets_and_two_addresses():
    with (
        SocketServer(FakeModel()) as one,
        SocketServer(FakeModel()) as two,
        ServerBackbone(f"{one.url}, {two.url}/v1/", concurrency=2) as server,
    ):
        check_backbone(server, tolerance=1e-9)
        assert one.served
        assert two.served
