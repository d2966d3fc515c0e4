"""Loading pretrained models: from a folder, from nowhere, and never by running somebody's code."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import KIND, MEAN, tiny_base, tiny_encoder, tiny_model, tiny_rows
from netweight import model as module
from netweight.encode import TextEncoder
from netweight.errors import MissingExtra, ModelError, OptionError
from netweight.model import Model, Range, pretrained, skeleton
from netweight.network import Transformer
from netweight.run.local import logits_of
from netweight.task import Classify, Score

TASK = Classify(("bad", "good", "so so"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base")


def test_a_folder_gives_its_backbone_and_a_zero_head(base: Path) -> None:
    made = pretrained(str(base), TASK, max_length=16)
    assert isinstance(made.network, Transformer)
    assert made.network.head.weight.shape == (3, 32)
    assert made.network.head.weight.abs().sum() == 0
    assert not made.network.training
    assert made.depth == 1
    assert made.encoder.max_length == 16
    assert made.encoder.vocabulary == tiny_encoder().vocabulary + 2 * len(KIND)
    assert made.base.name == "base"
    assert len(made.base.digest) == 64
    assert made.base.licence == "unknown"
    wanted = tiny_model(layers=1, more=KIND + MEAN).network.state_dict()["backbone.encoder.layer.0.output.dense.weight"]
    assert torch.equal(made.network.state_dict()["backbone.encoder.layer.0.output.dense.weight"], wanted)
    tokens = made.encoder.encode(tiny_rows(8).text)
    assert logits_of(made, tokens).shape == (8, 3)
    assert pretrained(base, TASK, max_length=np.int64(16)).digest == made.digest
    moved = shutil.copytree(base, base.parent / "elsewhere" / "base")
    assert pretrained(moved, TASK, max_length=16).digest == made.digest, "where it lies changes nothing"
    assert made.base.digest == module.digests(str(base))["weights"]
    (base / "more.safetensors").write_bytes(b"of another part")
    assert pretrained(str(base), TASK).base.digest == module.digests(str(base))["weights"] != made.base.digest


def test_rows_are_no_longer_than_the_positions_that_there_are(base: Path) -> None:
    assert pretrained(str(base), TASK, max_length=512).encoder.max_length == 40


def test_licence_and_pooling_are_read_from_the_folder(base: Path) -> None:
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n", encoding="utf-8")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}), encoding="utf-8")
    made = pretrained(str(base), TASK)
    assert made.base.licence == "apache-2.0"
    assert isinstance(made.network, Transformer)
    assert made.network.pooling == "first"


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_ignores_padding(pooling: module.Pooling) -> None:
    made = tiny_model()
    assert isinstance(made.network, Transformer)
    network = Transformer(made.network.backbone, 2, pooling).eval()
    tokens = made.encoder.encode(["great zip", "great zip the dress was late after my week"])
    with torch.no_grad():
        alone, both = (network(*map(torch.from_numpy, tokens.padded(rows, 0))) for rows in ([0], [0, 1]))
    assert torch.allclose(alone[0], both[0], atol=1e-5)


def test_saving_and_loading_keep_everything(tmp_path: Path) -> None:
    made = tiny_model(Score(2.0, 3.0, "mae"))
    made = Model(
        made.network,
        made.encoder,
        made.task,
        made.base,
        {"backbone.x": Range(-1.0, 2.0, 8, (0.5, 2.0)), "backbone.y": Range(0.0, 1.0)},
    )
    made.save(str(tmp_path / "deep" / "folder"))
    again = Model.load(str(tmp_path / "deep" / "folder"))
    assert again.digest == made.digest
    assert (again.task, again.base, again.ranges) == (made.task, made.base, made.ranges)
    assert again.encoder.fingerprint == made.encoder.fingerprint
    tokens = made.encoder.encode(tiny_rows(9).text)
    assert torch.equal(logits_of(again, tokens), logits_of(made, tokens))


@pytest.mark.parametrize("gone", ["model.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused(tmp_path: Path, gone: str) -> None:
    tiny_model().save(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(ModelError, match="holds no complete saved model"):
        Model.load(tmp_path)
    tiny_model().save(tmp_path)
    (tmp_path / gone).write_bytes((tmp_path / gone).read_bytes()[:-20])
    with pytest.raises(ModelError):
        Model.load(tmp_path)


def test_a_model_saved_over_another_is_never_half_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save(tmp_path)

    def full(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module, "atomic", full)
    with pytest.raises(OSError, match="no space left"):
        tiny_model(Classify(("x", "y"))).save(tmp_path)
    with pytest.raises(ModelError, match="holds no complete saved model"):
        Model.load(tmp_path)


def test_the_digest_sees_every_part() -> None:
    made = tiny_model()
    others = [
        tiny_model(seed=1),
        tiny_model(Classify(("bad", "good"), "macro-f1")),
        Model(made.network, tiny_encoder(31), made.task, made.base),
        Model(made.network, made.encoder, made.task, module.Base("other")),
        Model(made.network, made.encoder, made.task, made.base, {"x": Range(0.0, 1.0)}),
    ]
    assert len({made.digest, *(other.digest for other in others)}) == 6
    assert tiny_model().digest == made.digest


class Evil:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


def test_no_pickle_is_read(base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()
    mark = tmp_path / "mark"
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ModelError, match=r"no weights in safetensors.*can run code.*save_pretrained\(FOLDER\)"):
        pretrained(str(base), TASK)
    assert not mark.exists()
    pickle.loads((base / "pytorch_model.bin").read_bytes())
    assert mark.exists(), "the trap does not work, so nothing was tested"


@pytest.mark.parametrize("where", ["index", "config", "outside"])
def test_a_model_may_name_no_pickle_as_its_weights(where: str, base: Path, tmp_path: Path) -> None:
    """transformers would give it to torch.load: what an index lists, and what a configuration names."""
    weights, config = base / "model.safetensors", json.loads((base / "config.json").read_text(encoding="utf-8"))
    torch.save(load_file(weights), base / "adapter_model.bin")
    if where == "config":
        (base / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    else:
        other = {"index": "adapter_model.bin", "outside": "../elsewhere.safetensors"}[where]
        weights.rename(base / "part.safetensors")
        shutil.copy(base / "part.safetensors", tmp_path / "elsewhere.safetensors")
        listed = dict.fromkeys(load_file(base / "part.safetensors"), other)
        index = base / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    with pytest.raises(ModelError, match=r"no weights in safetensors, or not all, .*can run code"):
        pretrained(str(base), TASK)
    if where == "index":
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(listed, "part.safetensors")}))
        assert pretrained(str(base), TASK).base.digest
        index.write_text("[]")
        with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json lists no weights"):
            pretrained(str(base), TASK)


def test_an_adapter_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder or the Hub: transformers with peft would load it by itself, from a pickle where there is one."""
    (base / "adapter_config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(module, "_download", lambda name: base)
    for name in (str(base), "org/name"):
        with pytest.raises(ModelError, match=r"holds an adapter .*Merge it .* merge_and_unload\(\) of peft"):
            pretrained(name, TASK)
        with pytest.raises(ModelError, match="only whole models are read"):
            skeleton(name)


def test_no_code_of_a_model_is_run(base: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (base / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for kind in ("bert", "evil"):
        config |= {"model_type": kind, "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
        (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if kind == "bert":
            pretrained(str(base), TASK)  # what transformers itself knows is loaded without that file
        else:
            with pytest.raises(ModelError, match="cannot be loaded"):
                pretrained(str(base), TASK)
        assert not mark.exists()


@pytest.mark.parametrize(("family", "flag"), [("mt5", True), ("bart", True), ("t5", False)])
def test_encoder_decoders_are_refused(base: Path, family: str, flag: bool) -> None:
    stated = {"model_type": family, "is_encoder_decoder": flag}
    (base / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    with pytest.raises(ModelError, match=rf"is an encoder-decoder \({family}\).*Name an encoder, .* or a decoder"):
        pretrained(str(base), TASK)
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        skeleton(str(base))
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        pretrained(str(base), TASK)  # and nobody is sent to convert weights first


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"'no-such/model' is no local folder.*\(HF_HUB_OFFLINE is set\).*pass a folder"
    ):
        pretrained("no-such/model", TASK)
    for name in ("../x", "a/b/c", "", ".hidden", "with space"):
        with pytest.raises(ModelError, match="is no folder and no Hub id"):
            pretrained(name, TASK)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded"):
        pretrained(str(tmp_path / "empty"), TASK)


def test_a_folder_without_tokenizer(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer: none of tokenizer.json, vocab.txt"):
        pretrained(str(base), TASK)
    (base / "vocab.json").write_text("{}", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(module.AutoTokenizer, "from_pretrained", lambda *_, **options: object())
        with pytest.raises(ModelError, match="has no tokenizer that the `tokenizers` library can run"):
            pretrained(str(base), TASK)
    (base / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="tokenizer definition cannot be read"):
        pretrained(str(base), TASK)


def test_the_starter_is_checked(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install '\.\[starter\]'"):
        pretrained("starter", TASK)
    shutil.copytree(base, tmp_path / "package" / "model")
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / "package")])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ModelError, match="starter's weights hash to .* reinstall"):
        pretrained("starter", TASK)
    monkeypatch.setattr(module, "_STARTER_SHA256", module._sha256(base / "model.safetensors"))
    assert pretrained("starter", TASK).base.name == "starter"


@pytest.mark.parametrize("paired", [False, True])
def test_large_tables_are_tokenized_in_parts(paired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each token `tokenizers` holds many bytes until all texts that it was given are done."""
    texts = [f"the zip №{i} {'my ' * (i % 5)}" for i in range(10)]
    given = (texts, texts[::-1]) if paired else (texts,)
    wanted, encoder, asked = tiny_encoder().encode(*given), tiny_encoder(), list[int]()

    class Spy:
        def encode_batch_fast(self, rows: list[Any]) -> list[Any]:
            asked.append(len(rows))
            return tokenizer.encode_batch_fast(rows)

    tokenizer = encoder._tokenizer
    assert encoder.marks
    monkeypatch.setattr(encoder, "_tokenizer", Spy())
    monkeypatch.setattr("netweight.encode._TEXTS", 4)
    found = encoder.encode(*given)
    assert asked == [4, 4, 2]
    assert found.digest == wanted.digest
    with pytest.raises(OptionError, match="one pair text for each"):
        encoder.encode(texts[:8], texts)
    assert len(encoder.encode([], [] if paired else None)) == 0


def test_encoders_say_what_is_wrong() -> None:
    for length in (3, 8193):
        with pytest.raises(OptionError, match=f"max_length is {length}; use 4 to 8192"):
            tiny_encoder(length)
    with pytest.raises(ModelError, match="tokenizer definition cannot be read"):
        TextEncoder("no json")
