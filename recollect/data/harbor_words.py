"""The words of the bundled world: what items of each domain are called and how their attributes read.

Every attribute that moves a choice (theme, mood, kind) is said in title, categories and text; the make
(format, material) is said too but moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

THEMES = (
    "the sea",
    "outer space",
    "mountains",
    "gardens",
    "old railways",
    "wild animals",
    "medieval times",
    "music",
)
THEME_NOUNS = (
    ("Tide", "Lighthouse", "Harbour", "Anchor", "Reef", "Schooner"),
    ("Comet", "Orbit", "Nebula", "Starship", "Moonbase", "Eclipse"),
    ("Summit", "Glacier", "Ridge", "Alpine Hut", "Avalanche", "Cairn"),
    ("Orchard", "Greenhouse", "Rose Bed", "Hedgerow", "Trellis", "Seedling"),
    ("Locomotive", "Signal Box", "Sleeper Train", "Branch Line", "Viaduct", "Platform"),
    ("Otter", "Wolf", "Heron", "Badger", "Lynx", "Falcon"),
    ("Castle", "Knight", "Abbey", "Jester", "Banner", "Drawbridge"),
    ("Cello", "Choir", "Melody", "Trumpet", "Waltz", "Drummer"),
)
MOODS = ("cosy", "dark", "playful", "minimalist", "grand")
NAMES = (
    "Marlow", "Ivy", "Quentin", "Tamsin", "Orla", "Bertram", "Saskia", "Lionel", "Petra", "Hugo", "Maeve", "Casper",
    "Dorothea", "Felix", "Greta", "Jonas", "Linnea", "Oskar", "Rosalind", "Silas", "Thea", "Viktor", "Wilma", "Yusuf",
)  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """Vocabulary of one domain.

    kinds: what a person likes in this domain only.  makes: formats or materials, without any effect on choices.
    title: format with name, noun, mood, kind.  text: format with mood, kind, theme, noun, make.
    """

    name: str
    prefix: str
    kinds: tuple[str, ...]
    makes: tuple[str, ...]
    title: str
    text: str


DOMAINS = (
    Domain(
        "books",
        "book",
        ("mystery novel", "romance novel", "biography", "poetry collection", "travelogue"),
        ("hardcover", "paperback", "large print"),
        "{name} and the {noun}: a {mood} {kind}",
        "A {mood} {kind} about {theme}, told around the {noun}. Available in {make}.",
    ),
    Domain(
        "films",
        "film",
        ("thriller", "comedy", "documentary", "animated film", "courtroom drama"),
        ("colour", "black and white", "widescreen"),
        "The {noun} of {name}: a {mood} {kind}",
        "A {mood} {kind} set in the world of {theme}; its central image is the {noun}. Shot in {make}.",
    ),
    Domain(
        "games",
        "game",
        ("strategy game", "puzzle game", "racing game", "role-playing game", "card game"),
        ("boxed edition", "download", "collector's tin"),
        "{noun} {name}: {mood} {kind}",
        "A {mood} {kind} themed on {theme}. Players start with the {noun}. Sold as {make}.",
    ),
    Domain(
        "kitchenware",
        "kitchen",
        ("teapot", "chopping board", "mug set", "apron", "baking tin"),
        ("ceramic", "wood", "enamel"),
        "{name} {kind} with {noun} motif, {mood} style",
        "A {mood} {kind} decorated with motifs of {theme}, above all the {noun}. Finished in {make}.",
    ),
)
