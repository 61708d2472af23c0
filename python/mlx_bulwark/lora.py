"""Private fine-tuning of mlx-lm's models, as ``mlx_lm.lora`` does it without privacy.

Same data, configuration files and adapters. What differs: batches are Poisson-sampled, gradients are clipped and
noised, and a ledger in the adapter's folder holds what was spent, over all runs that continue it.
"""

import argparse
import json
import math
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from tqdm import tqdm

from .demo.progress import Stop, stoppable, waiting
from .privacy import Batches, PrivacyEngine, TokenRows, token_loss
from .privacy.ledger import read_ledger
from .privacy.optimizer import PrivateOptimizer
from .privacy.taps import named_arrays

LEDGER = "ledger.jsonl"
# Beside those of mlx_lm.lora: what privacy needs, and a batch that noise does not drown.
DEFAULTS: dict[str, Any] = {
    "batch_size": 64,
    "microbatch_size": 4,
    "delta": None,
    "max_grad_norm": 1.0,
    "clipping": "flat",
    "accountant": "pld",
    "grad_sample_mode": "ghost",
    "report_loss": False,
    "unit_key": None,
    "max_rows_per_unit": None,
}
OPTIMIZERS = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}
REFUSED = {  # settings of mlx_lm.lora that have no place here
    "grad_accumulation_steps": "batch_size is that of a whole step; microbatch_size is what is held in memory",
    "grad_checkpoint": (
        "it drops what the layers saw, which private gradients need; a smaller --microbatch-size saves memory and "
        "changes nothing else"
    ),
    "report_to": "what depends on the data is not sent anywhere",
}


class SettingError(ValueError):
    """A setting, a file or the model cannot be used."""


@dataclass
class Figures:
    """What came out. Losses of validation and test depend on those data, which epsilon does not cover."""

    model: str
    fine_tune_type: str
    rows: int
    unit_key: str | None
    max_rows_per_unit: int | None
    dataset_size: int  # rows, or units where rows have a key of theirs
    epsilon: float
    epsilon_target: float
    delta: float
    adjacency: str
    accountant: str
    sample_rate: float
    expected_batch_size: float
    noise_multiplier: float
    max_grad_norm: float
    clipping: str
    steps: int
    steps_before: int
    steps_planned: int
    trainable_parameters: int
    adapter_path: str
    seconds_per_step: float | None = None
    peak_memory_bytes: int | None = None
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    test_loss: float | None = None
    interrupted: bool = False

    def write_json(self, file: Path) -> None:
        """Write all figures."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")


DESCRIPTION = """Fine-tune a model of mlx-lm with differential privacy: LoRA, DoRA or full, 4-bit models included.

Options, data, configuration files and adapters are those of mlx_lm.lora, and adapters are loaded as its own are. The
noise is the least that keeps all steps within --epsilon. What was spent stands in ledger.jsonl beside the adapters, and
counts when they are trained on (--resume-adapter-file)."""


def parse(arguments: Sequence[str]) -> tuple[types.SimpleNamespace, Path | None]:
    """Settings of a run from the words of a command line, and the file that takes the figures.

    Raises:
        SettingError: A setting cannot be used, or the configuration file cannot be read.
        SystemExit: A word is not known, or help was asked for.
    """
    from mlx_lm.lora import build_parser

    parser = build_parser()
    parser.prog, parser.description = "mlx-bulwark dp-lora", DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    private = parser.add_argument_group("privacy")
    private.add_argument("--epsilon", type=float, help="privacy budget, over all runs of the ledger (required)")
    private.add_argument("--delta", type=float, help="chance that the bound fails (default: 0.1 / examples)")
    private.add_argument("--max-grad-norm", type=float, help="clipping norm of an example's gradient (default: 1)")
    private.add_argument("--clipping", help="flat, automatic or per_layer (default: flat)")
    private.add_argument("--accountant", help="pld or rdp (default: pld)")
    private.add_argument(
        "--grad-sample-mode", help="ghost, or loop: slow, for models that ghost refuses (default: ghost)"
    )
    private.add_argument(
        "--microbatch-size",
        type=int,
        help="rows held in memory; --batch-size is the examples, or units, of a step (default: 4, 64)",
    )
    private.add_argument(
        "--report-loss", action="store_true", default=None, help="show the training loss, which epsilon does not cover"
    )
    private.add_argument(
        "--unit-key", metavar="KEY", help="protect all rows with the same KEY, such as user, as one (default: each row)"
    )
    private.add_argument(
        "--max-rows-per-unit", type=int, help="rows of one unit in a step, chosen secretly (default: --microbatch-size)"
    )
    private.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file as well")
    given = vars(parser.parse_args(arguments))
    json_file, config = given.pop("json"), given.pop("config")
    if not given["clear_cache_threshold"]:  # the parser's own default, which would hide the file's
        given["clear_cache_threshold"] = None
    return settings(given, Path(config) if config else None), json_file


def settings(given: dict[str, Any], config: Path | None = None) -> types.SimpleNamespace:
    """Settings of a run: those that are given, else of the configuration file, else the defaults.

    Args:
        given: by name; None where not given.
        config: a YAML file as of ``mlx_lm.lora``.

    Raises:
        SettingError: the file cannot be read, or a setting cannot be used.
    """
    import yaml
    from mlx_lm.lora import CONFIG_DEFAULTS, yaml_loader

    defaults = CONFIG_DEFAULTS | DEFAULTS
    found: dict[str, Any] = {}
    if config is not None:
        try:
            found = yaml.load(config.read_text(), yaml_loader) or {}
        except (OSError, yaml.YAMLError) as e:
            raise SettingError(f"--config must be a YAML file but {config} is not: {e}") from None
        if not isinstance(found, dict):
            raise SettingError(f"--config must hold settings by name but {config} holds {type(found).__name__}")
    merged = defaults | {k: v for k, v in found.items() if v is not None}
    merged |= {k: v for k, v in given.items() if v is not None} | {"train": True}
    for name, why in REFUSED.items():
        if merged[name] != defaults[name]:
            raise SettingError(f"{_flag(name)} must be left out: {why}")
    return _checked(types.SimpleNamespace(**merged))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _checked(args: types.SimpleNamespace) -> types.SimpleNamespace:
    if getattr(args, "epsilon", None) is None:
        raise SettingError("--epsilon must be given: the privacy budget of the training, over all runs of its ledger")
    for name in ("epsilon", "max_grad_norm", "learning_rate"):
        value = getattr(args, name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise SettingError(f"{_flag(name)} must be positive and finite but is {value}")
    for name in ("iters", "batch_size", "microbatch_size", "save_every", "steps_per_eval"):
        value = getattr(args, name)
        if not isinstance(value, int) or value < 1:
            raise SettingError(f"{_flag(name)} must be a positive whole number but is {value}")
    if args.max_rows_per_unit is not None and args.unit_key is None:
        raise SettingError("--max-rows-per-unit must come with --unit-key but comes alone")
    if args.unit_key is not None:
        if args.max_rows_per_unit is None:
            args.max_rows_per_unit = args.microbatch_size
        if not isinstance(args.max_rows_per_unit, int) or not 1 <= args.max_rows_per_unit <= args.microbatch_size:
            raise SettingError(
                f"--max-rows-per-unit must be from 1 to the {args.microbatch_size} of --microbatch-size but is "
                f"{args.max_rows_per_unit}"
            )
    if args.delta is not None and not 0 < args.delta < 1:
        raise SettingError(f"--delta must be in (0, 1) but is {args.delta}")
    for name, known in {
        "fine_tune_type": ("lora", "dora", "full"),
        "optimizer": tuple(OPTIMIZERS),
        "clipping": ("flat", "automatic", "per_layer"),
        "grad_sample_mode": ("ghost", "loop"),
        "accountant": ("pld", "rdp"),
    }.items():
        if getattr(args, name) not in known:
            raise SettingError(f"{_flag(name)} must be one of {', '.join(known)} but is {getattr(args, name)}")
    return args


def train(args: types.SimpleNamespace, say: Callable[[str], None] = print) -> Figures:
    """Fine-tune a model of mlx-lm privately, and save its adapters as mlx-lm reads them.

    Args:
        args: as of `settings`.
        say: takes lines about how it goes.

    Returns:
        Figures: What was spent and found; after Ctrl-C, of the steps until then.

    Raises:
        SettingError: A setting, the data or the model cannot be used; nothing was spent.
    """
    with stoppable() as stop:
        model, tokenizer = _load(args)
        rows, units, validation, test = _data(args, tokenizer)
        if rows.num_truncated:
            say(f"{rows.num_truncated} examples are longer than {args.max_seq_length} tokens and were cut off")
        folder = Path(args.adapter_path)
        _prepare(args, model)
        with waiting("Finding the noise"):
            engine, before = _engine(args, len(rows) if units is None else len(set(units)), folder)
        report = engine.validate(model)
        if not report.is_valid:
            raise SettingError(f"the model cannot be trained privately:\n{report}")
        batches = engine.batches(
            rows.data,
            steps=args.iters,
            microbatch_size=args.microbatch_size,
            units=units,
            max_rows_per_unit=args.max_rows_per_unit,
        )
        figures = _figures(args, engine, model, before, len(rows))
        _announce(figures, say)
        _save_config(args, figures, folder)
        try:
            _steps(args, engine, model, batches, validation, figures, stop)
        except KeyboardInterrupt:
            figures.interrupted = True
        finally:
            stop.held = True
            engine.close()
        _save(model, folder / "adapters.safetensors")
        figures.steps, figures.epsilon = engine.steps, engine.epsilon(figures.delta)
        if args.test and not figures.interrupted:
            figures.test_loss = _evaluate(args, model, test, args.test_batches)
            say(f"test loss {figures.test_loss:.3f}, perplexity {math.exp(figures.test_loss):.3f}")
    return figures


def _load(args: types.SimpleNamespace) -> tuple[Any, Any]:
    from mlx_lm.utils import load

    try:
        model, tokenizer = load(
            args.model,
            tokenizer_config={"trust_remote_code": args.trust_remote_code},
            trust_remote_code=args.trust_remote_code,
        )[:2]
    except (OSError, ValueError) as e:
        raise SettingError(f"--model must be a model of mlx-lm but {args.model} is not: {e}") from e
    return model, tokenizer


def _data(args: types.SimpleNamespace, tokenizer: Any) -> tuple[TokenRows, list[str] | None, Any, Any]:
    """Training rows and their units, and validation and test data as mlx-lm takes them."""
    from mlx_lm.tuner.datasets import CacheDataset, load_dataset

    try:
        train_set, validation, test = load_dataset(args, tokenizer)
    except ModuleNotFoundError as e:
        raise SettingError(
            f"--data must be a folder with train.jsonl but {args.data} is none; `pip install {e.name}` lets it be the "
            "name of a Hugging Face data set"
        ) from e
    except (OSError, ValueError, KeyError) as e:
        raise SettingError(f"--data must hold train.jsonl as of mlx_lm.lora but {args.data} does not: {e}") from e
    examples = CacheDataset(train_set)
    with waiting("Reading the data"):
        rows = TokenRows([examples[i] for i in range(len(examples))], args.max_seq_length)
    units = None if args.unit_key is None else _units(train_set, args.unit_key)
    most, what = (len(rows), "examples") if units is None else (len(set(units)), f"different {args.unit_key}")
    if args.batch_size > most:
        raise SettingError(f"--batch-size must be at most the {most} training {what} but is {args.batch_size}")
    kept, tested = (CacheDataset(d) if len(d) else None for d in (validation, test))
    return rows, units, kept, tested


def _units(train_set: Any, key: str) -> list[str]:
    """Whose each row is; 7 and "7" are the same."""
    units = []
    for i in range(len(train_set)):
        value = train_set[i].get(key)
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise SettingError(
                f"--unit-key must be in every row, with a string or a whole number, but {key!r} of row {i + 1} is "
                f"{value!r}"
            )
        units.append(str(value))
    return units


def _prepare(args: types.SimpleNamespace, model: Any) -> None:
    """Freeze the model and make the part trainable that is to be trained, as ``mlx_lm.lora`` does."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(args.seed)
    model.freeze()
    if args.num_layers > len(model.layers):
        raise SettingError(f"--num-layers must be at most the model's {len(model.layers)} but is {args.num_layers}")
    if args.fine_tune_type == "full":
        for layer in model.layers[-max(args.num_layers, 0) :]:
            layer.unfreeze()
        for _, module in model.named_modules():
            if type(module).__name__.startswith("Quantized"):
                module.freeze()  # unfreezing a layer frees the integers in it too
        args.lora_parameters = None
    else:
        try:
            linear_to_lora_layers(model, args.num_layers, args.lora_parameters, use_dora=args.fine_tune_type == "dora")
        except (KeyError, ValueError) as e:
            raise SettingError(f"lora_parameters must fit the model but do not: {e}") from e
    if args.resume_adapter_file is not None:
        try:
            model.load_weights(str(args.resume_adapter_file), strict=False)
        except (OSError, RuntimeError, ValueError) as e:
            raise SettingError(f"--resume-adapter-file must hold adapters of this model but does not: {e}") from e


def _engine(args: types.SimpleNamespace, dataset_size: int, folder: Path) -> tuple[PrivacyEngine, int]:
    """The engine of this run, and the steps that its ledger holds already.

    A run that begins gets the noise with which all its steps stay within epsilon; one that is continued keeps its own.
    """
    ledger = _ledger(args, folder)
    args.delta = 0.1 / dataset_size if args.delta is None else args.delta
    folder.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {
        "delta": args.delta,
        "batch_size": args.batch_size,
        "max_grad_norm": args.max_grad_norm,
        "clipping": args.clipping,
        "accountant": args.accountant,
        "grad_sample_mode": args.grad_sample_mode,
        "ledger": ledger,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="delta .* is not below")  # it is announced
        if not (spent := read_ledger(ledger).runs if ledger.exists() else ()):
            delta = how.pop("delta")
            return PrivacyEngine.for_epsilon(args.epsilon, delta, dataset_size, steps=args.iters, **how), 0
        sigma = spent[-1].event.mechanism.noise_multiplier
        engine = PrivacyEngine(dataset_size, noise_multiplier=sigma, target_epsilon=args.epsilon, **how)
    left = engine._up_to_date_books().remaining() or 0
    if args.iters > left:
        gone, before = engine.epsilon(), engine.steps
        engine.close()
        raise SettingError(
            f"--iters must be at most {left} but is {args.iters}: the {before} steps of {ledger} spent epsilon "
            f"{gone:.3f} of {args.epsilon:g}"
        )
    return engine, engine.steps


def _ledger(args: types.SimpleNamespace, folder: Path) -> Path:
    """The ledger that this run continues or begins."""
    ledger, config = folder / LEDGER, folder / "adapter_config.json"
    if args.resume_adapter_file is None:
        if ledger.exists():
            raise SettingError(
                f"--adapter-path must be a new folder but {ledger} is there: continue that run by "
                "--resume-adapter-file, or its budget would be spent twice"
            )
        return ledger
    beside = Path(args.resume_adapter_file).parent / LEDGER
    if beside.exists() and beside.resolve() != ledger.resolve():
        raise SettingError(
            f"--adapter-path must be {beside.parent}, where the ledger of these adapters is, but is {folder}"
        )
    if config.exists() and (before := json.loads(config.read_text()).get("unit_key")) != args.unit_key:
        raise SettingError(
            f"--unit-key must be {before}, as the steps of {ledger} had it, but is {args.unit_key}: one budget is of "
            "one kind of unit"
        )
    return ledger


def _figures(args: types.SimpleNamespace, engine: PrivacyEngine, model: Any, before: int, rows: int) -> Figures:
    return Figures(
        model=str(args.model),
        fine_tune_type=args.fine_tune_type,
        rows=rows,
        unit_key=args.unit_key,
        max_rows_per_unit=args.max_rows_per_unit,
        dataset_size=engine.dataset_size,
        epsilon=engine.epsilon(args.delta),
        epsilon_target=float(args.epsilon),
        delta=float(args.delta),
        adjacency=engine.adjacency,
        accountant=engine.accountant,
        sample_rate=engine.sample_rate,
        expected_batch_size=engine.expected_batch_size,
        noise_multiplier=engine.noise_multiplier,
        max_grad_norm=engine.max_grad_norm,
        clipping=args.clipping,
        steps=before,
        steps_before=before,
        steps_planned=before + args.iters,
        trainable_parameters=sum(p.size for _, p in named_arrays(model.trainable_parameters())),
        adapter_path=str(args.adapter_path),
    )


def _announce(figures: Figures, say: Callable[[str], None]) -> None:
    f = figures
    data, unit = f"{f.rows} examples", "example"
    if f.unit_key is not None:
        data = f"{data} of {f.dataset_size} different {f.unit_key}"
        unit = f"{f.unit_key} (at most {f.max_rows_per_unit} examples)"
    say(
        f"{data}, {f.trainable_parameters:,} trainable parameters; each step draws every {unit} "
        f"with probability {f.sample_rate:.4g}, clips its gradient to norm {f.max_grad_norm:g} and adds noise of "
        f"{f.noise_multiplier:.3f} times that"
    )
    if f.steps_before:
        say(f"the ledger holds {f.steps_before} steps already: epsilon {f.epsilon:.3f} of {f.epsilon_target:g}")
    if f.delta >= 1 / f.dataset_size:
        say(
            f"WARNING: delta {f.delta:g} is not below 1 / {f.dataset_size}, the number of "
            f"{'examples' if f.unit_key is None else 'units'}: publishing one of them whole would be within such a "
            "guarantee"
        )


def guarantee(figures: Figures) -> str:
    """Say what was spent, and for whom it holds."""
    f = figures
    whose = "One line of the training data is one example: who wrote several is protected line by line."
    if f.unit_key is not None:
        whose = f"A unit is all lines of the training data with the same {f.unit_key}."
    return (
        f"epsilon {f.epsilon:.3f} of {f.epsilon_target:g} at delta {f.delta:.3g} after {f.steps} steps "
        f"({f.adjacency}; {f.accountant.upper()}). {whose}"
    )


def _save_config(args: types.SimpleNamespace, figures: Figures, folder: Path) -> None:
    """As mlx-lm writes it, so that it loads the adapters."""
    from mlx_lm.utils import save_config

    plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    save_config(plain | {"noise_multiplier": figures.noise_multiplier}, folder / "adapter_config.json")


def _save(model: Any, file: Path) -> None:
    mx.save_safetensors(str(file), dict(named_arrays(model.trainable_parameters())))


def _optimizer(args: types.SimpleNamespace) -> optim.Optimizer:
    from mlx_lm.tuner.utils import build_schedule

    rate = build_schedule(args.lr_schedule) if args.lr_schedule else args.learning_rate
    optimizer: optim.Optimizer = OPTIMIZERS[args.optimizer](
        learning_rate=rate, **args.optimizer_config.get(args.optimizer, {})
    )
    return optimizer


def _steps(
    args: types.SimpleNamespace,
    engine: PrivacyEngine,
    model: Any,
    batches: Batches,
    validation: Any,
    figures: Figures,
    stop: Stop,
) -> None:
    optimizer = engine.wrap(_optimizer(args))
    step = engine.compiled_step(model, optimizer, token_loss)
    folder, first = Path(args.adapter_path), engine.steps
    total, weight = mx.array(0.0), mx.array(0)
    _validate(args, model, validation, engine.steps, figures)
    model.train()
    took = 0.0
    with tqdm(total=args.iters, unit="step", desc="Training") as bar:
        stop.held = True
        for batch in batches:
            began = time.perf_counter()
            losses = step(batch)
            mx.eval(losses, model.state, optimizer.state, engine.state)
            took += time.perf_counter() - began
            if args.report_loss:
                total, weight = total + losses.sum(), weight + batch.mask.sum()
                mx.eval(total, weight)
            if not batch.last:
                continue
            done = engine.steps - first
            figures.seconds_per_step, figures.peak_memory_bytes = took / done, mx.get_peak_memory()
            bar.update()
            if done % args.steps_per_report == 0 or done == args.iters:
                bar.set_postfix_str(_progress(engine, args, optimizer, total, weight))
                total, weight = mx.array(0.0), mx.array(0)
            if done % args.save_every == 0:
                _save(model, folder / "adapters.safetensors")
                _save(model, folder / f"{engine.steps:07d}_adapters.safetensors")
            if done % args.steps_per_eval == 0 or done == args.iters:
                _validate(args, model, validation, engine.steps, figures)
                model.train()
            stop.check()


def _progress(
    engine: PrivacyEngine, args: types.SimpleNamespace, optimizer: PrivateOptimizer, total: mx.array, weight: mx.array
) -> str:
    text = f"epsilon {engine.epsilon(args.delta):.3f} of {args.epsilon:g}, rate {optimizer.learning_rate.item():.3g}"
    text += f", peak {mx.get_peak_memory() / 1e9:.2f} GB"
    if args.report_loss:
        text += f", loss {(total / mx.maximum(weight, 1)).item():.3f} (not covered by epsilon)"
    return text


def _validate(args: types.SimpleNamespace, model: Any, validation: Any, step: int, figures: Figures) -> None:
    if validation is None or args.val_batches == 0:
        return
    loss = _evaluate(args, model, validation, args.val_batches)
    figures.validation_losses.append((step, loss))
    tqdm.write(f"step {step}: validation loss {loss:.3f}")


def _evaluate(args: types.SimpleNamespace, model: nn.Module, dataset: Any, batches: int) -> float:
    """mlx-lm's own loss over a data set that is not trained on."""
    from mlx_lm.tuner.trainer import evaluate

    return float(
        evaluate(model, dataset, min(args.microbatch_size, len(dataset)), batches, max_seq_length=args.max_seq_length)
    )
