"""Training: resumable to the bit whatever stopped it, and it never loses a good checkpoint."""

import errno
import json
import math
import os
import pickle
import resource
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import quincunx as qx
from helpers.training import DATA, TINY, assert_equal_states, log_of, network, pictures, run, stop_in
from quincunx.data import load_data
from quincunx.measure.latency import using_threads
from quincunx.progress import progress_bar
from quincunx.train import recipes
from quincunx.train.checkpoint import read_checkpoint
from quincunx.train.evaluation import evaluate
from quincunx.train.loop import Interrupted, RunFailed, fit
from quincunx.train.recipes import Recipe, recipe_with

pytestmark = pytest.mark.usefixtures("one_thread")


def leftovers(folder):
    return [p.name for p in folder.rglob(".*") if p.name != ".lock"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    result, model = run(folder)
    return folder, result, model


# ---- a run, and a run in pieces


def test_a_run_leaves_a_checkpoint_a_log_a_result_and_an_artifact(straight):
    folder, result, model = straight
    assert sorted(p.name for p in folder.glob("[!.]*")) == ["checkpoint.pt", "log.jsonl", "model", "run.json"]
    assert json.loads((folder / "run.json").read_text()) == result
    assert [line["epoch"] for line in log_of(folder)] == [1, 2, 3]
    loaded = qx.load(folder / "model")
    assert_equal_states(loaded.state_dict(), model.state_dict())
    again = evaluate(loaded, DATA.test, DATA)
    assert again.error == result["test_error"]
    assert again.loss == pytest.approx(result["test_loss"], rel=1e-5)


def test_the_result_says_how_it_was_made(straight):
    _, result, model = straight
    assert result["kind"] == "train"
    assert result["seed"] == 0
    assert result["network"] == model.quincunx_spec
    assert result["recipe"] == json.loads(json.dumps(vars(TINY)))
    assert result["data"] == DATA.describe()
    assert result["augment"] == "cifar"
    assert result["cost"]["macs"] == qx.cost(model, torch.zeros(1, 1, 8, 8)).macs
    assert result["cost"]["params"] == sum(p.numel() for p in model.parameters())
    assert result["test_error"] == result["history"][-1]["test_error"]
    environment = result["environment"]
    assert environment["threads"] == torch.get_num_threads()
    assert environment["torch"] == torch.__version__
    assert {"command", "commit", "quincunx", "python", "cpu", "time"} <= set(environment)
    json.dumps(result, allow_nan=False)


def test_one_seed_gives_one_run_and_another_another(straight, tmp_path):
    folder, result, model = straight
    again, twin = run(tmp_path / "twin")
    assert_equal_states(twin.state_dict(), model.state_dict())
    assert log_of(tmp_path / "twin") == log_of(folder)
    assert again["test_loss"] == result["test_loss"]
    _, other = run(tmp_path / "other", seed=1)
    assert not torch.equal(other.stem.weight, model.stem.weight)


PIECES = [  # network, training step that is interrupted (three an epoch), channels_last, threads
    *(("rsbn8", step, True, 1) for step in (1, 3, 4, 5, 9)),
    ("rsbn8", 5, False, 1),
    ("rsbn8", 5, True, 2),
    ("rrn8", 5, True, 1),
    ("rrn8", 8, False, 1),
    ("csbn20", 5, True, 1),
]


@pytest.mark.parametrize(("name", "step", "layout", "threads"), PIECES)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, name, step, layout, threads):
    with using_threads(threads):
        check_resumed(tmp_path, name, step, replace(TINY, channels_last=layout))


def check_resumed(tmp_path, name, step, recipe):
    _, whole = run(tmp_path / "whole", model=network(name), recipe=recipe)
    folder = tmp_path / "pieces"
    done = (step - 1) // 3
    with pytest.raises(Interrupted, match=rf"after {done} of 3 epochs.*checkpoint\.pt.*--resume"):
        run(folder, model=stop_in(network(name), step, KeyboardInterrupt()), recipe=recipe)
    assert leftovers(folder) == []
    assert len(json.loads(read_checkpoint(folder / "checkpoint.pt")["history"])) == done
    torch.manual_seed(123)  # resuming depends on nothing that is in the air
    _, model = run(folder, model=network(name, seed=77), recipe=recipe, resume=True)
    assert_equal_states(model.state_dict(), whole.state_dict())
    assert log_of(folder) == log_of(tmp_path / "whole")
    one, two = (read_checkpoint(f / "checkpoint.pt")["optimizer"] for f in (folder, tmp_path / "whole"))
    assert one["param_groups"] == two["param_groups"]
    for key, state in one["state"].items():
        assert torch.equal(state["momentum_buffer"], two["state"][key]["momentum_buffer"])


def test_what_a_network_draws_at_random_is_resumed_too(tmp_path):
    def dropping():
        model = network()
        model.norm.register_forward_hook(lambda m, _, out: F.dropout(out, 0.5, m.training))
        return model

    _, whole = run(tmp_path / "whole", model=dropping())
    with pytest.raises(Interrupted):
        run(tmp_path / "run", model=stop_in(dropping(), 5, KeyboardInterrupt()))
    torch.manual_seed(123)
    _, model = run(tmp_path / "run", model=dropping(), resume=True)
    assert_equal_states(model.state_dict(), whole.state_dict())


def test_every_epoch_and_every_seed_has_an_order_of_its_own(tmp_path):
    seen = []
    for seed in (0, 1):
        model = network()
        model.register_forward_pre_hook(lambda m, x: seen.append(x[0].sum((1, 2, 3))) if m.training else None)
        run(tmp_path / str(seed), model=model, recipe=replace(TINY, augment="none"), seed=seed)
    epochs = [torch.cat(seen[i : i + 3]) for i in range(0, 18, 3)]
    for i, epoch in enumerate(epochs):
        torch.testing.assert_close(epoch.sort().values, epochs[0].sort().values)  # each image once
        assert not any(torch.equal(epoch, other) for other in epochs[:i])


def test_a_run_can_be_stopped_again_and_again(straight, tmp_path):
    with pytest.raises(Interrupted, match="after 0 of 3"):
        run(tmp_path / "run", model=stop_in(network(), 2, KeyboardInterrupt()))
    with pytest.raises(Interrupted, match="after 1 of 3"):
        run(tmp_path / "run", model=stop_in(network(seed=5), 5, KeyboardInterrupt()), resume=True)
    with pytest.raises(Interrupted, match="after 1 of 3"):
        run(tmp_path / "run", model=stop_in(network(seed=6), 1, KeyboardInterrupt()), resume=True)
    _, model = run(tmp_path / "run", model=network(seed=7), resume=True)
    assert_equal_states(model.state_dict(), straight[2].state_dict())
    assert log_of(tmp_path / "run") == log_of(straight[0])


def test_an_interrupt_while_testing_keeps_the_epochs_before(straight, tmp_path):
    model, calls = network(), []

    def hook(module, _):
        if not module.training:
            calls.append(0)
            if len(calls) == 4:  # two to measure the network, one an epoch
                raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(hook)
    with pytest.raises(Interrupted, match="after 1 of 3"):
        run(tmp_path / "run", model=model)
    handle.remove()
    _, model = run(tmp_path / "run", model=network(seed=8), resume=True)
    assert_equal_states(model.state_dict(), straight[2].state_dict())


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_whichever_write_fails_the_run_goes_on_later(straight, tmp_path, monkeypatch, number, error):
    """Renames, in turn: the checkpoint and the log before the first epoch, after it, and so on."""
    real, calls = os.replace, []

    def instead(source, target):
        calls.append(target)
        if len(calls) == number + 1:
            raise error
        return real(source, target)

    monkeypatch.setattr(os, "replace", instead)
    kind = Interrupted if isinstance(error, KeyboardInterrupt) else RunFailed
    with pytest.raises(kind) as caught:
        run(tmp_path / "run")
    monkeypatch.undo()
    if kind is Interrupted:
        kept = "whose checkpoint is in" if number else "before there was a checkpoint"
        assert f"after {max(0, number - 1) // 2} of 3 epochs, {kept}" in str(caught.value)
    else:
        assert "No space left on device" in str(caught.value)
    assert leftovers(tmp_path) == []
    _, model = run(tmp_path / "run", model=network(seed=9 if number else 0), resume=True)
    assert_equal_states(model.state_dict(), straight[2].state_dict())
    assert log_of(tmp_path / "run") == log_of(straight[0])


def test_a_finished_run_can_be_resumed_and_changes_nothing(straight, tmp_path):
    run(tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "run" / "log.jsonl").unlink()
    result, model = run(tmp_path / "run", model=network(seed=4), resume=True)
    assert_equal_states(model.state_dict(), straight[2].state_dict())
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert log_of(tmp_path / "run") == log_of(straight[0])
    assert result["test_error"] == straight[1]["test_error"]


def test_resume_without_a_checkpoint_starts(straight, tmp_path):
    _, model = run(tmp_path / "run", resume=True)
    assert_equal_states(model.state_dict(), straight[2].state_dict())


# ---- a full disk


@contextmanager
def no_room_beyond(size):
    """Within: the kernel refuses to let a file of this process grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_keeps_the_checkpoint_before(straight, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path / "run", model=stop_in(network(), 5, KeyboardInterrupt()))
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    message = r"File too large.*last whole checkpoint.*checkpoint\.pt"
    with no_room_beyond(4096), pytest.raises(RunFailed, match=message):
        run(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert leftovers(tmp_path) == []
    _, model = run(tmp_path / "run", resume=True)
    assert_equal_states(model.state_dict(), straight[2].state_dict())


def test_no_room_for_the_first_checkpoint_is_said_before_any_training(tmp_path):
    with no_room_beyond(4096), pytest.raises(RunFailed, match="File too large"):
        run(tmp_path / "run", model=stop_in(network(), 1, AssertionError("it trained")))
    assert leftovers(tmp_path) == []


def test_no_room_for_the_artifact_keeps_the_checkpoint(straight, tmp_path, monkeypatch):
    class NoRoom:
        def __call__(self, *arguments, **options):
            with no_room_beyond(1000):
                return qx.save(*arguments, **options)

    monkeypatch.setattr("quincunx.train.loop.save", NoRoom())
    with pytest.raises(RunFailed, match="weights cannot be written"):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "model").exists()
    run(tmp_path / "run", resume=True)
    assert_equal_states(qx.load(tmp_path / "run" / "model").state_dict(), straight[2].state_dict())


# ---- what is refused


def test_a_folder_with_a_run_is_refused(straight):
    folder = straight[0]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match=r"holds a run already; --resume"):
        run(folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_what_lies_where_the_artifact_goes_is_seen_before_any_training(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"thesis\.tex.*not replaced"):
        run(tmp_path, model=stop_in(network(), 1, AssertionError("it trained")))
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["model"]


OTHERS = {
    "network": ({"model": ("rrn8", {})}, "another network.*name was 'rsbn8', now 'rrn8'"),
    "width": ({"model": ("rsbn8", {"width": 5})}, "another network.*'width': 4.*now.*'width': 5"),
    "sampling": ({"model": ("rsbn8", {"sampling": "1/4"})}, "another network.*settings.*1/4"),
    "lr": ({"recipe": replace(TINY, lr=0.1)}, r"another recipe.*lr was 0\.05, now 0\.1$"),
    "epochs": ({"recipe": replace(TINY, epochs=4)}, "another recipe.*epochs was 3, now 4$"),
    "milestones": ({"recipe": replace(TINY, milestones=(0.6,))}, r"milestones was \[0\.5\], now \[0\.6\]$"),
    "seed": ({"seed": 4}, "another seed.*was 0, now 4$"),
    "data": ({"data": replace(DATA, name="other")}, "another data.*name was 'pictures', now 'other'$"),
    "pixels": ({"data": replace(DATA, mean=(0.41,))}, r"another data.*mean was \[0\.4\], now \[0\.41\]$"),
    "count": ({"data": pictures(21)}, "another data.*train was 20, now 21$"),
}


@pytest.mark.parametrize(("changes", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(straight, changes, message):
    folder = straight[0]
    before = (folder / "checkpoint.pt").read_bytes()
    if "model" in changes:
        name, settings = changes["model"]
        changes = {**changes, "model": network(name, **settings)}
    with pytest.raises(ValueError, match=message) as caught:
        run(folder, resume=True, **changes)
    assert str(folder / "checkpoint.pt") in str(caught.value)
    assert (folder / "checkpoint.pt").read_bytes() == before


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def torch_file(content):
    def write(path):
        torch.save(content, path)

    return write


GOOD = {"format": "quincunx-checkpoint", "version": 1}
FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("epoch 1\n"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "tensor": torch_file(torch.zeros(3)),
    "other-format": torch_file({"state_dict": {}}),
    "newer": torch_file({**GOOD, "version": 2}),
    "incomplete": torch_file(GOOD),
    "no-json": torch_file({**GOOD, "identity": "{", "history": "[]", "model": {}, "optimizer": {}}),
    "number": torch_file({**GOOD, "identity": 3, "history": "[]", "model": {}, "optimizer": {}}),
}


@pytest.mark.parametrize("write", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_checkpoint_is_refused_and_kept(tmp_path, write):
    path = tmp_path / "checkpoint.pt"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt: "):
        run(tmp_path, resume=True)
    assert path.read_bytes() == before


def test_nothing_is_unpickled(tmp_path):
    trap = tmp_path / "executed"
    for content in (Payload(trap), {**GOOD, "model": Payload(trap)}):
        torch.save(content, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match="corrupt, or no checkpoint"):
            run(tmp_path, resume=True)
        assert not trap.exists()


@pytest.mark.parametrize("change", ["other-shape", "missing", "more"])
def test_a_checkpoint_whose_weights_do_not_fit_is_refused(straight, tmp_path, change):
    content = read_checkpoint(straight[0] / "checkpoint.pt")
    if change == "other-shape":
        content["model"]["stem.weight"] = torch.zeros(2, 1, 3, 3)
    elif change == "missing":
        del content["model"]["stem.weight"]
    else:
        content["model"]["another.weight"] = torch.zeros(1)
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="does not fit the network"):
        run(tmp_path, resume=True)


@given(st.data())
def test_any_damage_to_a_checkpoint_is_noticed_or_harmless(straight, tmp_path_factory, data):
    whole = straight[0] / "checkpoint.pt"
    content = bytearray(whole.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("damage") / "checkpoint.pt"
    path.write_bytes(content)
    refused = None
    try:
        found = read_checkpoint(path)
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        assert refused.startswith(f"{path}: ")
        assert "\n" not in refused
    else:
        wanted = read_checkpoint(whole)
        assert_equal_states(found["model"], wanted["model"])
        assert (found["identity"], found["history"]) == (wanted["identity"], wanted["history"])


UNFIT = {
    "channels": (DATA, {"in_channels": 3}, "takes images of 3 channels, but those of pictures have 1"),
    "classes": (DATA, {"num_classes": 4}, "its head has 4 outputs, but pictures has 3 classes"),
}


@pytest.mark.parametrize(("data", "settings", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_a_network_that_does_not_fit_the_data_leaves_no_run(tmp_path, data, settings, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", model=network(**settings), data=data)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=message):
        evaluate(network(**settings), data.test, data)


def test_a_model_without_a_spec_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no spec"):
        run(tmp_path / "run", model=nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))


# ---- a loss that is not finite


def test_a_loss_that_is_not_finite_names_step_and_rate_and_keeps_the_checkpoint(tmp_path):
    model = network()
    steps = []

    def poison(module, _):
        if module.training:
            steps.append(0)
            if len(steps) == 5:
                with torch.no_grad():
                    module.stem.weight.fill_(float("nan"))

    model.register_forward_pre_hook(poison)
    with pytest.raises(
        RunFailed, match=r"loss is nan in epoch 2, step 2, at learning rate 0\.05;.*epoch 1 is"
    ):
        run(tmp_path, model=model)
    state = read_checkpoint(tmp_path / "checkpoint.pt")["model"]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert len(log_of(tmp_path)) == 1
    assert leftovers(tmp_path) == []


def test_weights_that_the_last_step_of_an_epoch_broke_never_reach_the_checkpoint(tmp_path):
    model = network()
    # the loss of the third step is still finite; the step itself is not
    steps = []

    def poison(gradient):
        steps.append(0)
        return gradient * float("inf") if len(steps) == 3 else gradient

    model.stem.weight.register_hook(poison)
    with pytest.raises(RunFailed, match=r"test loss is nan in epoch 1, step 3.*after epoch 0 is kept"):
        run(tmp_path, model=model)
    state = read_checkpoint(tmp_path / "checkpoint.pt")["model"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_rate_that_is_far_too_high_fails_in_one_sentence(tmp_path):
    with pytest.raises(RunFailed, match=r"at learning rate 1e\+30.*a smaller --lr may help"):
        run(tmp_path, recipe=replace(TINY, lr=1e30, warmup=0.0))


# ---- learning


@pytest.mark.parametrize("name", ["rrn8", "rsbn8"])
def test_narrow_networks_learn_digits(tmp_path, name):
    data = load_data("digits", size=8)
    torch.manual_seed(0)
    model = qx.networks.build(name, 10, 1, width=8)
    before = evaluate(model, data.test, data)
    recipe = Recipe(epochs=3, batch_size=32, lr=0.1, milestones=(0.7,))
    result = fit(model, data, recipe, tmp_path)
    losses = [entry["train_loss"] for entry in result["history"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
    assert before.error > 0.7  # chance is 0.9
    assert result["test_error"] < 0.2
    assert evaluate(qx.load(tmp_path / "model"), data.test, data).error == result["test_error"]


def test_evaluate_agrees_with_a_plain_loop_and_leaves_the_network_as_it_was():
    model = network()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    found = evaluate(model, DATA.test, DATA, batch_size=4)
    assert [module.training for module in model.modules()] == modes
    pixels = DATA.test.images.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        scores = model.eval()((pixels - 0.4) / 0.3)
    assert found.images == 10
    assert found.loss == pytest.approx(float(F.cross_entropy(scores, DATA.test.labels)), rel=1e-5)
    assert found.error == pytest.approx(float((scores.argmax(1) != DATA.test.labels).float().mean()))


def test_the_rates_of_a_run_are_those_of_the_recipe(tmp_path):
    rates, recipe = [], replace(TINY, epochs=4, milestones=(0.5, 0.75))
    model = network()
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    try:
        run(tmp_path, model=model, recipe=recipe)
    finally:
        handle.remove()
    assert rates == [recipe.lr_at(step / 12) for step in range(12)]
    assert rates[0] == 0
    assert rates[2:6] == [0.05] * 4
    assert rates[6:9] == pytest.approx([0.005] * 3)
    assert rates[9:] == pytest.approx([0.0005] * 3)
    assert [line["lr"] for line in log_of(tmp_path)] == rates[2::3]


def test_one_step_is_nesterov_sgd_with_weight_decay(tmp_path):
    data = pictures(6)
    recipe = Recipe(epochs=1, batch_size=6, lr=0.1, weight_decay=0.01, momentum=0.9)
    model, before = network(), network()
    result = fit(model, data, recipe, tmp_path)
    before.train()
    pixels = data.train.images.permute(0, 3, 1, 2).float() / 255
    scores = before((pixels - 0.4) / 0.3)
    loss = F.cross_entropy(scores, data.train.labels)
    loss.backward()
    wrong = float((scores.argmax(1) != data.train.labels).float().mean())
    assert result["history"][0]["train_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert result["history"][0]["train_error"] == pytest.approx(wrong)
    for (name, after), old in zip(model.named_parameters(), before.parameters(), strict=True):
        gradient = old.grad + 0.01 * old
        wanted = old - 0.1 * (gradient + 0.9 * gradient)  # the first step's momentum is its gradient
        torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("told", "suits", "used"),
    [(None, "cifar", "cifar"), (None, "none", "none"), ("cifar", "none", "cifar"), ("none", "cifar", "none")],
)
def test_the_data_set_says_whether_to_augment_unless_the_recipe_does(tmp_path, told, suits, used):
    data, recipe = replace(DATA, augment=suits), replace(TINY, epochs=1, augment=told)
    result, _ = run(tmp_path, data=data, recipe=recipe)
    assert result["augment"] == used


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_keeps_float32_weights_and_stays_near_float32(tmp_path, precision):
    exact, _ = run(tmp_path / "exact", recipe=replace(TINY, epochs=2))
    mixed, model = run(tmp_path / "mixed", recipe=replace(TINY, epochs=2, precision=precision))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ours, theirs = (r["history"][0]["train_loss"] for r in (mixed, exact))
    assert ours != theirs, "nothing was computed in lower precision"
    assert ours == pytest.approx(theirs, rel=0.05)
    assert mixed["recipe"]["precision"] == precision


def test_a_run_in_float16_resumes_with_the_scale_of_its_losses(tmp_path):
    recipe = replace(TINY, precision="float16")
    _, reference = run(tmp_path / "whole", recipe=recipe)
    with pytest.raises(Interrupted, match="after 1 of 3"):
        run(tmp_path / "parts", model=stop_in(network(), 5, KeyboardInterrupt()), recipe=recipe)
    _, resumed = run(tmp_path / "parts", recipe=recipe, resume=True)
    assert_equal_states(resumed.state_dict(), reference.state_dict())
    ours, theirs = (read_checkpoint(tmp_path / p / "checkpoint.pt")["scaler"] for p in ("parts", "whole"))
    assert ours == theirs
    assert ours["_growth_tracker"] == 9, "one for every step, over the interruption"


def test_a_batch_in_parts_gives_the_gradients_of_the_whole(tmp_path):
    """Without batch norm, which normalises each part by itself."""
    ends = []
    for parts in (1, 3):
        model = network()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, m=module: m  # stays as it is
        calls = []
        model.register_forward_pre_hook(
            lambda m, x, seen=calls: seen.append(len(x[0])) if m.training else None
        )
        run(tmp_path / str(parts), model=model, recipe=replace(TINY, epochs=1, accumulate=parts))
        ends.append(model.state_dict())
    assert calls == [3, 3, 2, 3, 3, 2, 2, 1, 1]
    for name, ours in ends[1].items():
        torch.testing.assert_close(ours, ends[0][name], rtol=1e-4, atol=1e-5)


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    errors = []

    def second(module, _):
        if not errors:
            with pytest.raises(RunFailed, match="another run is writing to it") as caught:
                run(tmp_path, resume=True)
            errors.append(caught.value)

    model = network()
    model.stem.register_forward_pre_hook(lambda m, x: second(m, x) if m.training else None)
    run(tmp_path, model=model)
    assert errors
    run(tmp_path, resume=True)  # free again


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "train.checkpoint.shutil.disk_usage",
            lambda _: SimpleNamespace(free=1000),
            "of disk, 0.0 MB are free there",
        ),
        ("data.memory.available", lambda: 10_000, r"a step of 8 images: needs .* MB of memory.*--batch-size"),
    ],
)
def test_too_little_disk_or_memory_is_said_before_training(tmp_path, monkeypatch, name, given, message):
    monkeypatch.setattr(f"quincunx.{name}", given)
    with pytest.raises((RunFailed, ValueError), match=message):
        run(tmp_path, model=stop_in(network(), 1, AssertionError("it trained")))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_auxiliary_classifiers_count_with_their_weight(tmp_path):
    """GoogLeNet's heads: the loss is that of all three, the error the main one's."""
    model = network()
    plain = model.forward
    model.forward = lambda x: (plain(x), plain(x)) if model.training else plain(x)
    recipe = replace(TINY, epochs=1, batch_size=20, augment="none")
    both, _ = run(tmp_path / "both", model=model, recipe=recipe)
    alone, _ = run(tmp_path / "alone", recipe=recipe)
    ours, theirs = both["history"][0], alone["history"][0]
    assert ours["train_loss"] == pytest.approx(1.3 * theirs["train_loss"], rel=1e-5)
    assert ours["train_error"] == theirs["train_error"]


def test_the_bar_is_for_people_only(capsys):
    with progress_bar(False) as bar:
        bar.advance(bar.add_task("x", total=1, state=""))
    assert capsys.readouterr() == ("", "")


# ---- recipes


@given(
    lr=st.floats(1e-6, 10),
    gamma=st.floats(0.01, 1),
    warmup=st.floats(0, 0.5),
    milestones=st.lists(st.floats(0.5, 0.999), max_size=3),
)
def test_the_schedule_rises_to_the_rate_and_then_only_falls(lr, gamma, warmup, milestones):
    recipe = Recipe(lr=lr, gamma=gamma, warmup=warmup, milestones=tuple(milestones))
    rates = [recipe.lr_at(i / 200) for i in range(200)]
    peak = math.ceil(200 * warmup)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) <= lr
    assert recipe.lr_at(1.0) == pytest.approx(lr * gamma ** len(milestones))


def test_the_papers_schedule():
    recipe = recipes.by_name("cifar")
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay) == (400, 64, 1e-4)
    steps = 782
    rates = {epoch: recipe.lr_at(epoch * steps / (400 * steps)) for epoch in (0, 199, 200, 299, 300, 399)}
    assert list(rates.values()) == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


BAD = [
    ("epochs", 0),
    ("epochs", 1.5),
    ("epochs", True),
    ("batch_size", 0),
    ("batch_size", "8"),
    ("lr", 0.0),
    ("lr", -0.1),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("milestones", (0.5, 1.0)),
    ("gamma", 0.0),
    ("gamma", 1.1),
    ("warmup", 1.0),
    ("warmup", -0.1),
    ("weight_decay", -1e-4),
    ("weight_decay", float("nan")),
    ("momentum", 1.0),
    ("momentum", -0.1),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_values_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"{key}=.*: expected"):
        Recipe(**{key: value})


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_by_name(name):
    assert recipes.by_name(name).name == name
    assert recipe_with(recipes.by_name(name), epochs=7, lr=None) == replace(recipes.by_name(name), epochs=7)


@pytest.mark.parametrize(("typed", "nearest"), [("cifra", "cifar"), ("digit", "digits"), ("SHORT", "short")])
def test_an_unknown_recipe_lists_the_nearest_first(typed, nearest):
    with pytest.raises(ValueError, match=f"recipe='{typed}'.*nearest first: {nearest}, ") as caught:
        recipes.by_name(typed)
    assert all(name in str(caught.value) for name in recipes.RECIPES)


# ---- learning from a teacher, fine-tuning


def test_distillation_mixes_the_labels_with_the_softened_answers_of_the_teacher(tmp_path):
    model, teacher = network(), network(seed=3)
    with torch.no_grad():
        teacher.classifier.weight.mul_(20)  # far from even answers
    recipe = replace(TINY, epochs=1, batch_size=20, augment="none", distill=0.7, temperature=3.0)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    result, _ = run(tmp_path, model=model, recipe=recipe, teacher=teacher)
    assert_equal_states(teacher.state_dict(), before)

    again = network()
    again.load_state_dict(start)
    images = (DATA.train.images.permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3
    scores, wanted = again.train()(images), teacher.eval()(images)
    soft = F.softmax(wanted / 3, 1)
    divergence = (soft * (soft.log() - F.log_softmax(scores / 3, 1))).sum(1).mean()
    loss = 0.3 * F.cross_entropy(scores, DATA.train.labels) + 0.7 * 9 * divergence
    assert result["history"][0]["train_loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


@pytest.mark.parametrize(("share", "teacher"), [(0.5, None), (0.0, "rsbn8")])
def test_a_teacher_is_there_if_and_only_if_it_is_asked(tmp_path, share, teacher):
    recipe = replace(TINY, distill=share)
    with pytest.raises(ValueError, match=r"teacher: the recipe's distill=0"):
        run(tmp_path, recipe=recipe, teacher=None if teacher is None else network(teacher))


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 classes"):
        run(tmp_path, recipe=replace(TINY, distill=0.5), teacher=network(num_classes=4))


def test_the_rate_falls_after_every_so_many_steps():
    recipe = recipes.finetune()
    assert [recipe.lr_at(0.5, step) for step in (0, 9_999, 10_000, 25_000)] == [1e-4, 1e-4, 5e-5, 2.5e-5]
    assert replace(TINY, gamma=0.5, every=2, milestones=(0.5,)).lr_at(0.6, 5) == 0.05 * 0.5**3
    with pytest.raises(ValueError, match="every=-1: expected at least 0"):
        Recipe(every=-1)


def test_a_recipe_survives_json_and_one_of_an_earlier_version_has_the_defaults():
    recipe = replace(recipes.finetune(), augment="cifar", milestones=(0.5,))
    assert recipes.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    earlier = {k: v for k, v in TINY.to_dict().items() if k not in ("every", "distill")}
    assert recipes.from_dict(earlier) == TINY
    with pytest.raises(ValueError, match="recipe: has no magic"):
        recipes.from_dict({"magic": 1})


def test_plain_momentum(tmp_path):
    models = []
    for nesterov in (True, False):
        _, model = run(tmp_path / str(nesterov), recipe=replace(TINY, epochs=1, nesterov=nesterov))
        models.append(model)
    assert not torch.equal(models[0].stem.weight, models[1].stem.weight)


# ---- images that are read while training


def photographs(folder, count=4):
    for part in ("train", "test"):
        for label in "abc":
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 255, (40, 48, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
    return load_data(folder, size=16, stream=True)


def test_a_streamed_set_trains_alike_with_any_number_of_workers(tmp_path):
    data = photographs(tmp_path / "data")
    recipe = replace(TINY, epochs=2, augment="imagenet")
    logs = []
    for workers in (0, 2):
        model = network(in_channels=3)
        result, _ = run(tmp_path / str(workers), model=model, data=data, recipe=recipe, workers=workers)
        logs.append(log_of(tmp_path / str(workers)))
        assert result["data"]["streamed"] is True
    assert logs[0] == logs[1]


def test_an_image_that_cannot_be_read_ends_the_run_with_its_name_and_keeps_the_checkpoint(tmp_path):
    data = photographs(tmp_path / "data")
    (tmp_path / "data" / "train" / "b" / "2.png").write_bytes(b"no picture")
    with pytest.raises(RunFailed, match=r"2\.png.*; the checkpoint after epoch 0 is kept in"):
        run(tmp_path / "run", model=network(in_channels=3), data=data, recipe=TINY, workers=1)
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")
