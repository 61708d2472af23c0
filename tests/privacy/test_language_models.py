"""Private fine-tuning of small mlx-lm models that are made, quantized, saved and loaded here by mlx-lm itself."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import mlx_bulwark as bw
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_bulwark import lora
from mlx_bulwark.cli import main
from mlx_lm.models import llama, qwen3
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, evaluate, iterate_batches
from mlx_lm.tuner.trainer import train as mlx_lm_train
from mlx_lm.utils import load, load_adapters, quantize_model, save_config, save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "patient", "has", "a", "cough", "and", "fever", "dose", "of", "two", "pills", "daily", "after", "meals"]
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "tie_word_embeddings": True,
}
KINDS = {
    "llama": lambda: llama.Model(llama.ModelArgs(model_type="llama", **SIZES)),
    "qwen3": lambda: qwen3.Model(
        qwen3.ModelArgs(model_type="qwen3", head_dim=16, max_position_embeddings=512, rope_theta=1e4, **SIZES)
    ),
}
MORE = {"qwen3": {"head_dim": 16, "max_position_embeddings": 512, "rope_theta": 1e4}}


def save_tokenizer(folder):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


def make_model(folder, kind, bits=4):
    mx.random.seed(0)
    model, config = KINDS[kind](), {"model_type": kind, **SIZES, **MORE.get(kind, {})}
    if bits:
        model, config = quantize_model(model, config, group_size=32, bits=bits)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    save_tokenizer(folder)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory):
    made = {}

    def get(kind="llama", bits=4):
        if (kind, bits) not in made:
            made[kind, bits] = tmp_path_factory.mktemp(f"{kind}{bits}")
            make_model(made[kind, bits], kind, bits)
        return made[kind, bits]

    return get


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, n in (("train", 40), ("valid", 8), ("test", 8)):
        texts = [" ".join(rng.choice(WORDS, rng.integers(3, 50))) for _ in range(n)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def arguments(model, data, folder, *more):
    options = {"--model": model, "--data": data, "--adapter-path": folder, "--epsilon": 8, "--iters": 3}
    options |= {"--batch-size": 8, "--num-layers": 2, "--learning-rate": 1e-3, "--val-batches": 1}
    return [str(w) for pair in options.items() for w in pair] + [str(w) for w in more]


def train(*words):
    return lora.train(lora.parse(arguments(*words))[0], say=lambda line: None)


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["mlx-bulwark", "dp-lora", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0


# ---- losses and rows


def test_loss_is_that_of_mlx_lm_but_an_example_at_a_time():
    model = KINDS["llama"]()
    sequences = [(list(range(3, 3 + n)), offset) for n, offset in ((5, 0), (33, 7), (12, 3), (2, 0))]
    tokens, spans = (mx.array(a[np.arange(4)]) for a in bw.TokenRows(sequences).data)
    losses = bw.token_loss(model, tokens, spans)
    counts = mx.array([n - max(offset, 1) + 1 for n, offset in ((5, 0), (33, 7), (12, 3), (2, 0))])
    whole, number = default_loss(model, tokens, spans)
    assert number.item() == counts.sum().item()
    assert (losses * counts).sum().item() / number.item() == pytest.approx(whole.item(), rel=1e-5)
    for i in range(4):
        alone, _ = default_loss(model, tokens[i : i + 1], spans[i : i + 1])
        assert losses[i].item() == pytest.approx(alone.item(), rel=1e-5)


def test_an_example_in_which_nothing_counts_has_no_loss():
    tokens, spans = (mx.array(a[np.arange(1)]) for a in bw.TokenRows([([3, 4], 5)]).data)
    assert bw.token_loss(KINDS["llama"](), tokens, spans).tolist() == [0.0]


def test_rows_are_padded_as_mlx_lm_pads_them():
    sequences = [([3] * n, 0) for n in (5, 40, 31, 32, 33)]
    ours, spans = bw.TokenRows(sequences).data
    for one in range(5):
        theirs, lengths = next(iterate_batches([sequences[one]], 1, 2048))
        assert ours[np.array([one])].tolist() == theirs.tolist()
        assert spans[one].tolist() == lengths.tolist()[0]
    rows = bw.TokenRows(sequences, 33)
    assert rows.num_truncated == 1
    assert rows[np.arange(5)].shape == (5, 33)
    with pytest.raises(ValueError, match="max_seq_length must be at least 2 but is 1"):
        bw.TokenRows(sequences, 1)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("kinds", ["lora", "dora", "full"])
def test_gradients_are_those_of_one_example_after_the_other(model_of, data, tmp_path, kind, kinds):
    """`engine.check` runs a one-by-one loop, finds coupled losses, and looks at the noise of every parameter."""
    args = lora.parse(arguments(model_of(kind), data, tmp_path, "--fine-tune-type", kinds))[0]
    model, tokenizer = lora._load(args)
    rows, _, _, _ = lora._data(args, tokenizer)
    lora._prepare(args, model)
    if kinds != "full":  # a fresh adapter has B = 0, and no gradient in A
        model.load_weights([(k, v + 0.01) for k, v in tree_flatten(model.trainable_parameters())], strict=False)
    engine = bw.PrivacyEngine(len(rows), batch_size=8, noise_multiplier=1.0, max_grad_norm=0.1)
    batch = tuple(mx.array(a[np.arange(4)]) for a in rows.data)
    engine.check(model, batch, bw.token_loss, rtol=2e-3)


# ---- the command


@pytest.mark.parametrize(
    ("kind", "bits", "fine_tune_type"),
    [("llama", 4, "lora"), ("qwen3", 4, "lora"), ("llama", 4, "dora"), ("qwen3", 0, "full"), ("llama", 0, "lora")],
)
def test_adapters_are_loaded_by_mlx_lm(model_of, data, tmp_path, kind, bits, fine_tune_type):
    folder = tmp_path / "adapters"
    figures = train(model_of(kind, bits), data, folder, "--fine-tune-type", fine_tune_type, "--test")
    assert figures.steps == figures.steps_planned == 3
    assert 0 < figures.epsilon <= 8
    assert figures.epsilon == pytest.approx(bw.ledger_epsilon(folder / "ledger.jsonl", figures.delta))
    assert figures.delta == 0.1 / 40
    assert figures.adjacency == "add or remove one example"
    assert [step for step, _ in figures.validation_losses] == [0, 3]
    assert figures.test_loss > 0
    before, tokenizer = load(str(model_of(kind, bits)))
    after, _ = load(str(model_of(kind, bits)), adapter_path=str(folder))
    tokens = mx.array([tokenizer.encode("the patient has fever")])
    assert not mx.allclose(before(tokens), after(tokens)).item()
    saved = mx.load(str(folder / "adapters.safetensors"))
    assert {k for k, v in tree_flatten(after.parameters()) if k in saved} == set(saved)


def test_frozen_weights_stay_as_they_are(model_of, data, tmp_path):
    train(model_of(), data, tmp_path / "adapters")
    saved = mx.load(str(tmp_path / "adapters" / "adapters.safetensors"))
    assert all(k.endswith(("lora_a", "lora_b")) for k in saved)
    assert all(mx.abs(v).max().item() > 0 for v in saved.values())


def test_it_learns_in_private(model_of, tmp_path):
    """Sentences that are all alike: with next to no noise the loss of others like them falls far."""
    folder = tmp_path / "data"
    folder.mkdir()
    line = json.dumps({"text": "the patient has a cough and fever"}) + "\n"
    (folder / "train.jsonl").write_text(line * 64)
    (folder / "valid.jsonl").write_text(line * 4)
    words = ("--epsilon", 200, "--delta", 1e-3, "--iters", 40, "--learning-rate", 2e-2, "--batch-size", 32)
    figures = train(model_of(), folder, tmp_path / "adapters", *words, "--microbatch-size", 32, "--accountant", "rdp")
    (_, first), (_, last) = figures.validation_losses[0], figures.validation_losses[-1]
    assert last < first - 1


def test_resume_goes_on_within_the_budget(model_of, data, tmp_path):
    folder = tmp_path / "adapters"
    first = train(model_of(), data, folder, "--iters", 4, "--save-every", 2)
    assert sorted(f.name for f in folder.glob("0*.safetensors")) == [
        "0000002_adapters.safetensors",
        "0000004_adapters.safetensors",
    ]
    with pytest.raises(lora.SettingError, match=r"--adapter-path must be a new folder but .*ledger.jsonl is there"):
        train(model_of(), data, folder)
    resume = ("--resume-adapter-file", folder / "0000002_adapters.safetensors", "--iters", 3)
    with pytest.raises(lora.SettingError, match=r"--iters must be at most 0 but is 3: the 4 steps of .* spent epsilon"):
        train(model_of(), data, folder, *resume)
    with pytest.raises(lora.SettingError, match=r"--adapter-path must be .*adapters, where the ledger of these"):
        train(model_of(), data, tmp_path / "other", *resume)
    more = train(model_of(), data, folder, *resume, "--epsilon", 16)
    assert (more.steps_before, more.steps, more.steps_planned) == (4, 7, 7)
    assert more.noise_multiplier == pytest.approx(first.noise_multiplier)
    assert first.epsilon < more.epsilon <= 16
    assert (folder / "ledger.jsonl").read_text().count('"step"') == 7


def test_microbatches_do_not_change_the_gradient(model_of, data, tmp_path):
    """Without noise and with all examples in every batch, the size of the physical batches is a matter of rounding."""
    found = []
    for size in (3, 40):
        args = lora.parse(arguments(model_of(), data, tmp_path, "--optimizer", "sgd"))[0]
        model, tokenizer = lora._load(args)
        rows, _, _, _ = lora._data(args, tokenizer)
        lora._prepare(args, model)
        engine = bw.PrivacyEngine(40, sample_rate=1.0, noise_multiplier=0.0, max_grad_norm=1.0, steps=2)
        optimizer = engine.wrap(lora._optimizer(args))
        step = engine.compiled_step(model, optimizer, bw.token_loss)
        for batch in engine.batches(rows.data, microbatch_size=size):
            mx.eval(step(batch), model.state, optimizer.state, engine.state)
        found.append(dict(tree_flatten(model.trainable_parameters())))
    for name in found[0]:
        np.testing.assert_allclose(np.array(found[0][name]), np.array(found[1][name]), atol=1e-6)


def test_prompts_are_masked(model_of, tmp_path):
    lines = [{"prompt": "the patient has a", "completion": "cough and fever"}] * 10
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(d) + "\n" for d in lines))
    args = lora.parse(arguments(model_of(), tmp_path, tmp_path / "a", "--mask-prompt"))[0]
    _, tokenizer = lora._load(args)
    rows, _, validation, _ = lora._data(args, tokenizer)
    assert rows.data[1].tolist() == [[4, 7]] * 10
    assert validation is None


def test_configuration_file(model_of, data, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {model_of()}\ndata: {data}\nepsilon: 8\niters: 50\nbatch_size: 8\nnum_layers: 2\nlearning_rate: 1e-3\n"
        "lora_parameters:\n  keys: [self_attn.q_proj]\n  rank: 2\n  scale: 10.0\n  dropout: 0.1\n"
        "lr_schedule:\n  name: cosine_decay\n  arguments: [1e-3, 50]\n"
    )
    words = ["--config", str(file), "--iters", "2", "--adapter-path", str(tmp_path / "a")]
    figures = lora.train(lora.parse(words)[0], say=lambda line: None)
    assert figures.steps == 2
    assert figures.trainable_parameters == 2 * (64 * 2 + 2 * 64)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 2
    model, _ = load(str(model_of()))
    load_adapters(model, str(tmp_path / "a"))


def test_command(monkeypatch, capsys, model_of, data, tmp_path):
    file = tmp_path / "figures.json"
    words = arguments(model_of(), data, tmp_path / "a", "--json", file, "--delta", 0.03, "--report-loss")
    assert command(monkeypatch, *words, "--steps-per-report", 1, "--max-seq-length", 32) == 0
    printed = capsys.readouterr()
    figures = json.loads(file.read_text())
    assert figures["steps"] == 3
    out = " ".join(printed.out.split())
    assert f"epsilon {figures['epsilon']:.3f} of 8 at delta 0.03 after 3 steps (add or remove one example; PLD)" in out
    assert "WARNING: delta 0.03 is not below 1 / 40" in out
    assert "examples are longer than 32 tokens and were cut off" in out
    assert "(not covered by epsilon)" in printed.err
    assert "loss" not in " ".join(line for line in printed.out.splitlines() if "validation" not in line)


def test_users_are_units(monkeypatch, capsys, model_of, data, tmp_path):
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    users = tmp_path / "users"
    users.mkdir()

    def write(rows):
        (users / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    write([{**row, "user": i % 10 if i % 20 < 10 else str(i % 10)} for i, row in enumerate(rows)])
    file = tmp_path / "figures.json"
    words = ["--unit-key", "user", "--max-rows-per-unit", 3, "--batch-size", 5, "--delta", 0.01, "--json", file]
    assert command(monkeypatch, *arguments(model_of(), users, tmp_path / "a", *words)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "40 examples of 10 different user" in out
    assert "each step draws every user (at most 3 examples) with probability 0.5" in out
    assert (
        "(add or remove one unit (all its rows); PLD). A unit is all lines of the training data with the same user."
        in out
    )
    figures = json.loads(file.read_text())
    assert (figures["rows"], figures["dataset_size"], figures["sample_rate"]) == (40, 10, 0.5)
    expected = bw.compute_epsilon(figures["noise_multiplier"], 0.5, figures["steps"], 0.01)
    assert figures["epsilon"] == pytest.approx(expected, rel=1e-6)
    assert figures["peak_memory_bytes"] > 0
    again = ["--resume-adapter-file", tmp_path / "a" / "adapters.safetensors"]
    assert command(monkeypatch, *arguments(model_of(), users, tmp_path / "a", *again)) == 2
    assert "--unit-key must be user, as the steps of" in capsys.readouterr().err
    write(rows[:1] + [{**row, "user": 1} for row in rows[1:]])
    assert command(monkeypatch, *arguments(model_of(), users, tmp_path / "b", "--unit-key", "user")) == 2
    assert "--unit-key must be in every row" in capsys.readouterr().err


def test_losses_are_not_shown_unasked(monkeypatch, capsys, model_of, data, tmp_path):
    assert command(monkeypatch, *arguments(model_of(), data, tmp_path / "a", "--steps-per-report", 1)) == 0
    printed = capsys.readouterr()
    assert "epsilon" in printed.err
    assert "loss" not in printed.err.replace("validation loss", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epsilon", "0"], "--epsilon must be positive and finite but is 0.0"),
        (["--delta", "1"], r"--delta must be in \(0, 1\) but is 1.0"),
        (["--batch-size", "41"], "--batch-size must be at most the 40 training examples but is 41"),
        (["--num-layers", "3"], "--num-layers must be at most the model's 2 but is 3"),
        (["--max-rows-per-unit", "2"], "--max-rows-per-unit must come with --unit-key but comes alone"),
        (["--unit-key", "a", "--max-rows-per-unit", "5"], "--max-rows-per-unit must be from 1 to the 4 of"),
        (["--grad-sample-mode", "hooks"], "--grad-sample-mode must be one of ghost, loop but is hooks"),
        (["--clipping", "soft"], "--clipping must be one of flat, automatic, per_layer but is soft"),
        (["--grad-accumulation-steps", "2"], "--grad-accumulation-steps must be left out"),
        (["--grad-checkpoint"], "--grad-checkpoint must be left out"),
        (["--data", "/nonexistent/data"], "--data must (hold|be a folder with) train.jsonl"),
        (["--config", "/nonexistent/c.yaml"], "--config must be a YAML file but /nonexistent/c.yaml is not"),
        (["--resume-adapter-file", "/nonexistent/a.safetensors"], "--resume-adapter-file must hold adapters"),
    ],
)
def test_bad_settings_end_with_one_line(monkeypatch, capsys, model_of, data, tmp_path, words, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert command(monkeypatch, *arguments(model_of(), data, tmp_path / "a", *words)) == 2
    error = capsys.readouterr().err
    assert re.search(rf"mlx-bulwark: {message}", error), error
    assert not (tmp_path / "a" / "ledger.jsonl").exists()


def test_epsilon_must_be_given(monkeypatch, capsys):
    assert command(monkeypatch, "--model", "x") == 2
    assert "--epsilon must be given" in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    assert command(monkeypatch, "--model", "x") == 1
    assert 'mlx_lm missing; pip install "mlx-bulwark[lm]"' in capsys.readouterr().err


def test_interrupt_keeps_adapters_and_ledger(model_of, data, tmp_path):
    folder = tmp_path / "a"
    words = arguments(model_of(), data, folder, "--iters", 5000, "--json", tmp_path / "figures.json")
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_bulwark.cli", "dp-lora", *words], stderr=subprocess.PIPE, env=environment
    )
    ledger = Path(folder) / "ledger.jsonl"
    while not ledger.exists() or ledger.read_text().count('"step"') < 3:
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["interrupted"]
    assert figures["steps"] == ledger.read_text().count('"step"') >= 3
    model, _ = load(str(model_of()))
    load_adapters(model, str(folder))


# ---- the pieces for mlx_lm.tuner.train


class Reports(TrainingCallback):
    def __init__(self):
        self.train, self.validation = [], []

    def on_train_loss_report(self, info):
        self.train.append(info)

    def on_val_loss_report(self, info):
        self.validation.append(info)


def tuned(model_of, data, folder, iters=3, accumulate=1, optimizer=None, **how):
    """Train by mlx-lm's own function; returns model, engine, reports and the data."""
    args = lora.parse(arguments(model_of(), data, folder))[0]
    model, tokenizer = lora._load(args)
    train_set, validation, _ = (CacheDataset(d) for d in lora_datasets(args, tokenizer))
    lora._prepare(args, model)
    settings = {"batch_size": 8, "noise_multiplier": 1.0, "max_grad_norm": 1.0, "steps": iters} | how
    engine = bw.PrivacyEngine(40, **settings)
    tuner = bw.PrivateTuner(engine, model, optimizer or optim.Adam(1e-3))
    reports, folder = Reports(), Path(folder)
    folder.mkdir(exist_ok=True)
    mlx_lm_train(
        model,
        tuner.optimizer,
        train_set,
        validation,
        TrainingArgs(
            batch_size=4,
            iters=iters,
            steps_per_report=1,
            steps_per_eval=2,
            grad_accumulation_steps=accumulate,
            adapter_file=folder / "adapters.safetensors",
        ),
        loss=tuner.loss,
        iterate_batches=tuner.iterate_batches,
        training_callback=reports,
    )
    return model, engine, reports, train_set, validation


def lora_datasets(args, tokenizer):
    from mlx_lm.tuner.datasets import load_dataset

    return load_dataset(args, tokenizer)


def test_tuner_trains_by_mlx_lm_itself(model_of, data, tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    model, engine, reports, _, validation = tuned(
        model_of, data, tmp_path / "a", iters=4, ledger=ledger, delta=1e-3, target_epsilon=100.0
    )
    assert engine.steps == 4
    assert ledger.read_text().count('"step"') == 4
    assert engine.epsilon() == pytest.approx(bw.compute_epsilon(1.0, 0.2, 4, 1e-3), rel=1e-6)
    assert [r["iteration"] for r in reports.train] == [1, 2, 3, 4]
    assert all(np.isnan(r["train_loss"]) and r["trained_tokens"] == 0 for r in reports.train)
    assert [r["iteration"] for r in reports.validation] == [0, 1, 3]
    start, _ = load(str(model_of()))
    np.random.seed(0)
    before = evaluate(start, validation, 4, 25)
    assert reports.validation[0]["val_loss"] == pytest.approx(before, rel=1e-3)
    saved = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert all(mx.array_equal(saved[k], trained[k]).item() for k in trained)
    assert all(mx.abs(saved[k]).max().item() > 0 for k in trained)


def test_tuner_takes_the_steps_of_the_engine(model_of, data, tmp_path):
    """Everything in every batch and no noise: the same as the engine's own compiled steps."""
    how = {"batch_size": 40, "noise_multiplier": 0.0, "iters": 3}
    model, *_, train_set, _ = tuned(model_of, data, tmp_path / "a", optimizer=optim.SGD(0.5), **how)
    args = lora.parse(arguments(model_of(), data, tmp_path / "b"))[0]
    other, _ = lora._load(args)
    lora._prepare(args, other)
    engine = bw.PrivacyEngine(40, batch_size=40, noise_multiplier=0.0, max_grad_norm=1.0, steps=3)
    optimizer = engine.wrap(optim.SGD(0.5))
    step = engine.compiled_step(other, optimizer, bw.token_loss)
    for batch in engine.batches(bw.TokenRows([train_set[i] for i in range(40)]).data):
        mx.eval(step(batch), other.state, optimizer.state, engine.state)
    expected = dict(tree_flatten(other.trainable_parameters()))
    for name, value in tree_flatten(model.trainable_parameters()):
        np.testing.assert_allclose(np.array(value), np.array(expected[name]), rtol=1e-4, atol=1e-6)


def test_tuner_draws_fresh_noise_in_every_step(model_of, data, tmp_path):
    """Clipped to next to nothing, an update is its noise: 1000 times the norm over the expected batch size."""
    moves = []
    for iters in (1, 2):
        model, *_ = tuned(
            model_of, data, tmp_path / str(iters), iters=iters, optimizer=optim.SGD(1.0),
            noise_multiplier=1e5, max_grad_norm=1e-5,
        )  # fmt: skip
        after = np.concatenate([np.array(v).ravel() for _, v in tree_flatten(model.trainable_parameters())])
        start, _ = load(str(model_of()))
        args = lora.parse(arguments(model_of(), data, tmp_path / "c"))[0]
        lora._prepare(args, start)
        before = np.concatenate([np.array(v).ravel() for _, v in tree_flatten(start.trainable_parameters())])
        moves.append(after - before)
    n = len(moves[0])
    # the standard deviation of one step is 1 / 8, of two independent ones sqrt(2) / 8; false alarm 1e-6
    for move, steps in zip(moves, (1, 2), strict=True):
        assert abs(move.std() / (np.sqrt(steps) / 8) - 1) < 5 / np.sqrt(2 * n)


def test_tuner_refuses_what_would_not_be_private(model_of, data, tmp_path):
    with pytest.raises(bw.PrivacyError, match="grad_accumulation_steps must be 1"):
        tuned(model_of, data, tmp_path / "a", iters=4, accumulate=2)
    with pytest.raises(bw.PrivacyError, match="steps must stay within the 2 planned ones"):
        tuned(model_of, data, tmp_path / "b", iters=4, steps=2)
    args = lora.parse(arguments(model_of(), data, tmp_path))[0]
    model, tokenizer = lora._load(args)
    lora._prepare(args, model)
    engine = bw.PrivacyEngine(41, batch_size=8, noise_multiplier=1.0, max_grad_norm=1.0)
    tuner = bw.PrivateTuner(engine, model, optim.SGD(1.0))
    batches = tuner.iterate_batches(CacheDataset(lora_datasets(args, tokenizer)[0]), 4, 64, loop=True)
    with pytest.raises(ValueError, match="dataset must have 41 examples but has 40"):
        next(batches)
