"""What a distillation refuses, in one line each."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.tiny_decoder import patterned_log, write_tiny_decoder

import recollect
from recollect.cli.main import main
from recollect.data.examples import training_sequences
from recollect.distill.learners import Crm, Llm, require_same_items
from recollect.distill.rounds import Strength, train_half
from recollect.errors import ConfigError, DataError, InputError, ModelFileError, ResumeRefused, UnknownName
from recollect.loop import LoopConfig
from recollect.recommenders.bert4rec import BERT4Rec
from recollect.recommenders.configs import SASRecConfig
from recollect.recommenders.llm_sequential import LlmConfig, LlmSequential
from recollect.recommenders.sasrec import SASRec

LOG = patterned_log(n_users=30)
FEW = patterned_log(n_users=30, n_items=20)


def fitted(log) -> SASRec:
    return SASRec(SASRecConfig(hidden=8, epochs=1, batch_size=16)).fit(log)


def test_a_teacher_of_another_item_vocabulary_is_refused(tmp_path):
    loop = LoopConfig(epochs=1)
    with pytest.raises(InputError, match="the teacher scores 20 items, the student 30"):
        train_half(
            Crm(fitted(LOG)),
            Crm(fitted(FEW)),
            training_sequences(LOG),
            how=Strength(),
            loop=loop,
            scratch=tmp_path / "scratch",
        )
    other = patterned_log(n_users=30, seed=5)  # as many items, but of other data
    with pytest.raises(InputError, match="column j of the two is not the same item"):
        require_same_items(Crm(fitted(LOG)), Crm(fitted(other)))


def test_item_vectors_of_another_catalogue_are_not_injected(tmp_path):
    decoder = write_tiny_decoder(tmp_path / "decoder")
    llm = LlmSequential(LlmConfig(base=str(decoder), keep_layers=1)).build(LOG, np.zeros((30, 8), dtype=np.float32))
    with pytest.raises(ConfigError, match=r"item vectors are \(20, 8\)"):
        Llm(llm).module.inject(fitted(FEW).module.item_vectors())


def test_a_student_that_does_not_predict_every_position_is_refused():
    with pytest.raises(UnknownName, match="unknown student 'bert4rec'"):
        recollect.distill(LOG, student="bert4rec")
    with pytest.raises(ConfigError, match="does not predict every position"):
        Crm(BERT4Rec())


def test_histories_too_short_to_hold_anything_out_are_refused(tmp_path):
    short = patterned_log(n_users=12, length=6)
    rows = np.flatnonzero(np.r_[True, np.diff(short.interactions.user) != 0])
    ends = np.r_[rows[1:], len(short.interactions)]

    def first(n):
        keep = np.concatenate([np.arange(low, min(low + n, high)) for low, high in zip(rows, ends, strict=True)])
        return dataclasses.replace(short, interactions=short.interactions.take(keep))

    options = {"core": 0, "seeds": 1, "teacher": str(write_tiny_decoder(tmp_path / "decoder")), "keep_layers": 2}
    with pytest.raises(InputError, match="no user of 'patterned' has 3 interactions"):
        recollect.distill(first(2), out=tmp_path / "two", **options)
    with pytest.raises(InputError, match="no training history of 'patterned' has 2 items"):
        recollect.distill(first(3), out=tmp_path / "three", **options)
    with pytest.raises(DataError):
        recollect.distill(first(3), out=tmp_path / "core", **{**options, "core": 50})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "magic"),
        ({"compare": ("static", "magic")}, "unknown method 'magic'"),
        ({"temperature_up": 0.0}, "temperature_up must be a positive number"),
        ({"strength_down": -1.0}, "strength_down must be 0 or a positive number"),
        ({"folds": 1}, "folds must be at least 2"),
        ({"teacher": "gpt-9"}, "unknown model 'gpt-9'"),
        ({"teacher": "minilm"}, "only embeds texts"),
        ({"keep_layers": 31}, r"keep_layers must be in 1\.\.30 for smollm2, got 31"),
        ({"teacher": "openai:http://127.0.0.1:1/v1"}, "does not run in this process"),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(options, message, tmp_path, smollm2_dir):
    with pytest.raises(InputError, match=message):
        recollect.distill(LOG, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder_is_refused(tmp_path):
    decoder = write_tiny_decoder(tmp_path / "decoder")
    options = {"core": 0, "seeds": 1, "rounds": 1, "teacher": str(decoder), "keep_layers": 1, "precision": "fp32"}
    options |= {
        "student_epochs": 1,
        "round_epochs": 1,
        "teacher_epochs": 1,
        "compare": ("none",),
        "method": "down-only",
    }
    recollect.distill(LOG, out=tmp_path / "run", **options)
    with pytest.raises(InputError, match="is not empty"):
        recollect.distill(LOG, out=tmp_path / "run", **options)
    with pytest.raises(ResumeRefused, match=r"has temperature_up 2\.0, not 3\.0"):
        recollect.distill(LOG, out=tmp_path / "run", resume=True, temperature_up=3.0, **options)


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    assert main(["distill", "harbor", "--student", "bert4rec"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("recollect: unknown student 'bert4rec'")
    assert message.count("\n") == 1
    assert main(["distill", "harbor", "--resume"]) == 2
    assert "--resume needs --out" in capsys.readouterr().err
    assert main(["distill", "harbor", "--teacher", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]) == 2
    assert "unknown model" in capsys.readouterr().err
    assert main(["distill", "harbor", "--dry-run"]) == 0
    assert "Downward half rounds per seed" in capsys.readouterr().out
    with pytest.raises(ModelFileError):
        LlmSequential.from_pretrained(tmp_path)
