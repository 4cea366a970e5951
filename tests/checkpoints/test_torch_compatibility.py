"""State_dicts that torch's strict loading takes are taken with the same values, also out of wrappers and trainers.

The reference is `load_state_dict(strict=True)` of the same network, and wrappers and trainers that are torch's own.
"""

import argparse
import copy
import datetime
import enum
import random
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from ffnet.checkpoints import matching
from ffnet.checkpoints.__main__ import main
from ffnet.checkpoints.loading import InvalidCheckpointError, load_checkpoint
from ffnet.model import build_model
from ffnet.variants import VARIANTS
from tests.helpers import checkpoint_forms as forms
from tests.helpers.networks import DEMO

COUNTER = "num_batches_tracked"
CONV, NORM = "backbone_model.conv0.weight", "backbone_model.bn0"


@pytest.fixture(autouse=True)
def few_variants(monkeypatch):
    monkeypatch.setattr(matching, "VARIANTS", {DEMO: VARIANTS[DEMO]})


@pytest.fixture
def demo():
    return forms.randomize(build_model(DEMO))


def without(state, *ends):
    return {key: tensor for key, tensor in state.items() if not key.endswith(ends)}


def mapped(state, change, wanted=lambda key: not key.endswith(COUNTER)):
    return {key: change(tensor) if wanted(key) else tensor for key, tensor in state.items()}


def with_attribute(tensor):
    """A tensor with an attribute, which torch saves by another function."""
    tensor.is_sharded = False
    return tensor


class Settings(OrderedDict):
    """A dictionary of a trainer's own class, as Lightning's AttributeDict."""


class PickledByPython2(OrderedDict):
    """Pickles as an OrderedDict did in Python 2."""

    def __reduce__(self):
        return OrderedDict, ([[key, tensor] for key, tensor in self.items()],)


TAKEN = {
    "as it is": lambda state: state,
    "dict": dict,
    "subclass of OrderedDict": Settings,
    "ordered as Python 2 pickled it": PickledByPython2,
    "no counters": lambda state: without(state, COUNTER),
    "float counters": lambda state: mapped(state, torch.Tensor.double, lambda key: key.endswith(COUNTER)),
    "float16": lambda state: mapped(state, torch.Tensor.half),
    "float64": lambda state: mapped(state, lambda t: t.double() + 1e-12),
    "integer weights": lambda state: mapped(state, lambda t: (9 * t).char(), lambda key: state[key].dim() == 4),
    "channels last": lambda state: mapped(
        state, lambda t: t.contiguous(memory_format=torch.channels_last), lambda key: state[key].dim() == 4
    ),
    "weights in the middle of a storage": lambda state: mapped(state, lambda t: torch.cat([t, t])[len(t) :]),
    "expanded": lambda state: state | {f"{NORM}.weight": torch.tensor(0.5).expand(16)},
    "parameters with attributes": lambda state: mapped(state, lambda t: with_attribute(nn.Parameter(t))),
    "tensors with attributes": lambda state: {key: with_attribute(tensor) for key, tensor in state.items()},
}
REFUSED = {
    "missing weight": lambda state: without(state, CONV),
    "unexpected key": lambda state: state | {"criterion.weight": torch.zeros(19)},
    "other shape": lambda state: state | {CONV: state[CONV][:-1]},
    "counter with two elements": lambda state: state | {f"{NORM}.{COUNTER}": torch.zeros(2, dtype=torch.long)},
    "number for a tensor": lambda state: state | {CONV: 3.0},
    "some keys with a prefix": lambda state: {
        f"module.{key}" if key.startswith("head") else key: t for key, t in state.items()
    },
}


@pytest.mark.parametrize("change", TAKEN.values(), ids=TAKEN)
def test_what_torchs_strict_loading_takes_is_taken_with_the_same_values(change, demo, tmp_path):
    state, reference = change(demo.state_dict()), build_model(DEMO)
    reference.load_state_dict(state, strict=True)
    for zipped in (True, False):
        torch.save(state, tmp_path / "x", _use_new_zipfile_serialization=zipped)
        loaded = load_checkpoint(DEMO, tmp_path / "x").model
        assert forms.same(loaded.state_dict(), reference.eval().state_dict())
        assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in reference.parameters()]


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_torchs_strict_loading_refuses_is_refused(change, demo, tmp_path):
    state = change(demo.state_dict())
    with pytest.raises((RuntimeError, AttributeError)):
        build_model(DEMO).load_state_dict(state, strict=True)
    torch.save(state, tmp_path / "x")
    with pytest.raises(InvalidCheckpointError):
        load_checkpoint(DEMO, tmp_path / "x")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn))
def test_safetensors_of_another_dtype_are_converted_and_the_report_says_so(dtype, demo, tmp_path):
    state, reference = mapped(demo.state_dict(), lambda t: t.to(dtype)), build_model(DEMO)
    reference.load_state_dict(state)
    safetensors.torch.save_file(state, tmp_path / "x")
    loaded = load_checkpoint(DEMO, tmp_path / "x")
    assert forms.same(loaded.model.state_dict(), reference.state_dict())
    assert loaded.notes == (f"Weights were converted from {str(dtype).removeprefix('torch.')} to float32.",)


class Trainer(nn.Module):
    """Holds the network under a name, as a LightningModule does."""

    def __init__(self, name, network):
        super().__init__()
        self.add_module(name, network)


def compiled(network):
    return torch.compile(network, backend="eager")


WRAPPED = {
    "module.": nn.DataParallel,
    "_orig_mod.": compiled,
    "model.": lambda network: Trainer("model", network),
    "module._orig_mod.model.": lambda network: nn.DataParallel(compiled(Trainer("model", network))),
}


@pytest.mark.parametrize("prefix, wrap", WRAPPED.items(), ids=WRAPPED)
def test_prefixes_of_wrappers_are_removed_and_said(prefix, wrap, demo, tmp_path, capsys):
    state = wrap(copy.deepcopy(demo)).state_dict()
    assert all(key.startswith(prefix) for key in state)
    torch.save(state, tmp_path / "x")
    loaded = load_checkpoint(DEMO, tmp_path / "x")
    assert forms.same(loaded.model.state_dict(), demo.state_dict())
    assert loaded.notes == (f"The prefix '{prefix}', which a wrapper adds, was removed from every key.",)
    assert main([str(tmp_path / "x")]) == 0
    printed = capsys.readouterr().out
    assert f"matches {DEMO}\n{loaded.notes[0]}\n" in printed and f"    {CONV} [16, 3, 3, 3] float32\n" in printed


def test_whole_module_in_a_wrapper_loads_exactly_and_its_hyperparameters_are_compared(demo, tmp_path, monkeypatch):
    monkeypatch.setitem(forms.NAMES, Trainer, forms.Name("__main__ Trainer"))
    forms.save_pickled(Trainer("net", demo), tmp_path / "x")
    loaded = load_checkpoint(DEMO, tmp_path / "x")
    assert loaded.form == "module" and forms.same(loaded.model.state_dict(), demo.state_dict())
    demo.backbone_model.conv1.stride = (1, 1)
    forms.save_pickled(Trainer("net", demo), tmp_path / "x")
    with pytest.raises(InvalidCheckpointError, match=r"backbone_model.conv1 has stride \(1, 1\)"):
        load_checkpoint(DEMO, tmp_path / "x")


class Optimizer(enum.Enum):
    """An option of a trainer."""

    ADAM = "adam"


CYCLE = argparse.Namespace(children=[])  # as omegaconf's nodes, which know their parents
CYCLE.children.append(CYCLE)
BESIDE = {
    "numpy scalar": np.float64(0.8), "numpy array": np.arange(3), "dtype": torch.float16, "size": torch.Size((1, 2)),
    "device": torch.device("cpu"), "datetime": datetime.datetime(2026, 1, 1), "path": Path("runs/1"),
    "namespace": argparse.Namespace(lr=0.1), "settings": Settings(lr=0.1), "counter": Counter("aab"), "bytes": b"x",
    "bytearray": bytearray(b"x"), "complex": 1j, "frozenset": frozenset((1, 2)), "enum": Optimizer.ADAM,
    "defaultdict": defaultdict(list, a=[1]), "deque": deque([1]), "random state": random.getstate(),
    "class": torch.optim.Adam, "cycle": CYCLE, "sparse tensor": torch.eye(2).to_sparse(), "large number": 10**400,
    "quantized tensor": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "decimal": Decimal("0.8"),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_values_of_any_class_beside_the_weights_do_not_matter(zipped, protocol, demo, tmp_path):
    state = {"state_dict": demo.state_dict()} | BESIDE | {Optimizer.ADAM: 1, torch.float16: 2, Optimizer: 3}
    torch.save(state, tmp_path / "x", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    assert forms.same(load_checkpoint(DEMO, tmp_path / "x").model.state_dict(), demo.state_dict())


@pytest.mark.parametrize("prefix", ["model.", "segmentor.network.", "a.module._orig_mod."])
def test_a_prefix_is_found_beside_other_keys_which_are_named(prefix, demo, tmp_path):
    others = {"criterion.weight": torch.ones(19)} | {f"ema.{key}": t + 1 for key, t in demo.state_dict().items()}
    state = {prefix + key: tensor for key, tensor in demo.state_dict().items()}
    torch.save({"state_dict": others | state}, tmp_path / "x")
    loaded = load_checkpoint(DEMO, tmp_path / "x")
    assert forms.same(loaded.model.state_dict(), demo.state_dict())
    assert f"The prefix '{prefix}'" in loaded.notes[1] and "ignored: 'criterion.weight', 'ema." in loaded.notes[1]

    del state[prefix + CONV]
    torch.save({"state_dict": others | state}, tmp_path / "x")
    with pytest.raises(InvalidCheckpointError, match=f"Missing keys: {CONV}"):
        load_checkpoint(DEMO, tmp_path / "x")


def trained(model):
    """What a training script saves beside the weights, after a step of torch's own optimizer, schedule and scaler."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model(torch.randn(1, 3, 64, 128)).square().mean().backward()
    optimizer.step()
    schedule.step()
    scaler = torch.amp.GradScaler("cpu").state_dict()
    states = {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(), "scaler": scaler}
    args = argparse.Namespace(lr=0.1, crop=(512, 1024), arch="ffnet", resume=None)
    return states | {"epoch": 3, "best_miou": 79.2, "args": args, "rng": torch.get_rng_state()}


@pytest.mark.parametrize("entry", ("state_dict", "model_state_dict", "model", "net", "weights", "model_ema"))
def test_the_state_dict_in_a_training_checkpoint_is_read_and_said(entry, demo, tmp_path):
    state = nn.DataParallel(demo).state_dict()
    torch.save(trained(demo) | {entry: state}, tmp_path / "x")
    loaded = load_checkpoint(DEMO, tmp_path / "x")
    assert loaded.form == "state_dict" and forms.same(loaded.model.state_dict(), demo.state_dict())
    assert loaded.notes[0] == f"The weights are the entry '{entry}' of a training checkpoint."
    assert "'module.'" in loaded.notes[1] and len(loaded.notes) == 2


def test_of_two_entries_the_trained_weights_are_read_and_the_average_is_named(demo, tmp_path):
    other = forms.randomize(build_model(DEMO), seed=1)
    torch.save({"model_ema": other.state_dict(), "model": demo.state_dict()}, tmp_path / "x")
    loaded = load_checkpoint(DEMO, tmp_path / "x")
    assert forms.same(loaded.model.state_dict(), demo.state_dict())
    assert loaded.notes[1] == "Not used, although they may hold weights too: 'model_ema'."
