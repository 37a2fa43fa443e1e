"""`adaround(...)`: options checked at the door, a recipe chosen, every layer learned, the result written back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.ao.quantization.backend_config import BackendConfig
from tqdm import tqdm

from adaround_plugin.regions.calibration import Sampling, bind_batches
from adaround_plugin.errors import InvalidOptionError
from adaround_plugin.regions.blocks import Block, find_blocks, named_blocks
from adaround_plugin.hosts.base import Host, Skipped
from adaround_plugin.hosts.open import open_host
from adaround_plugin.learning.layer import Recipe
from adaround_plugin.learning.learner import Learner, Settings
from adaround_plugin.names import select
from adaround_plugin.methods import resolve
from adaround_plugin.rounding.problem import Solver
from adaround_plugin.learning.finetuning import Refinement
from adaround_plugin.report import KEY, LayerReport, RecipeTrial, Report
from adaround_plugin.solvers import Nearest, Relaxation, GPTQ, get_solver

__all__ = ["adaround"]

Exclude = Iterable[str | type[nn.Module]]

# "auto" tries its recipes on about this many samples, with at most so many columns a layer
_TRIAL_SAMPLES = 128
_TRIAL_COLUMNS = 4096
_MANY_SAMPLES = 512


def adaround(
    prepared: nn.Module,
    batches: Iterable[Any],
    *,
    preset: Literal["default", "paper", "blocks"] = "default",
    solver: str | Solver = "auto",
    blocks: bool | Sequence[str] | Literal["auto"] = "auto",
    refine: bool | Refinement = False,
    inputs: Callable[[Any], Any] | None = None,
    exclude: Exclude = (),
    scale: Literal["auto", "observer", "search"] = "auto",
    asymmetric: bool | Literal["auto"] = "auto",
    correct_bias: bool | Literal["auto"] = "auto",
    column_weighting: Literal["auto", "none", "inverse_norm", "fisher"] = "auto",
    damping: float | Literal["auto"] = "auto",
    rounding: Literal["auto", "grid", "up_or_down"] = "auto",
    holdout: float | Literal["auto"] = "auto",
    max_columns: int = 16384,
    backend_config: BackendConfig | None = None,
    progress: bool = True,
    seed: int = 0,
    inplace: bool = False,
) -> fx.GraphModule:
    """Learn the rounding of every quantized weight; the line between calibration and conversion.

    Layers are decided in the order of the graph, each from the float and the quantized stream of activations
    (AdaRound, arXiv 2004.10568, equation 25; see docs/explanation/method.md). The result goes into the host's own
    convert, which reproduces the learned integers exactly.

    Args:
        prepared: a calibrated model from `prepare_fx` or `prepare_pt2e`, with AdaRound's or the host's own weight
            observers.
        batches: unlabelled calibration data: a DataLoader, a list, any iterable of tensors, tuples (positional) or
            dicts (keyword arguments). A few hundred samples do. A one-shot iterator is read once and kept in memory.
        preset: what `"auto"` means for the options below; an option that is given wins. `"default"`: annealing on
            second moments. `"paper"`: the relaxation with the paper's settings (10,000 steps a layer, equations 21 to
            25). `"blocks"`: annealing, then all roundings of a block learned together on samples; for 2 bits.
        solver: `"annealing"`, `"coordinate_descent"`, `"cross_entropy"`, `"nearest"`, `"relaxation"`, `"gptq"`,
            or an object: `Relaxation(...)`, or any with `solve`.
        blocks: with a `Relaxation` on samples, what is learned together. False: each layer by itself. True: blocks
            found in the graph (a residual block, layers of a chain in threes). A list: of modules or patterns, each a
            block; other layers are only started.
        refine: when all is rounded, learn scales and biases of the whole network by the error of its output, integers
            as they are: scales of weights and biases as the options above leave them free, and step sizes of the
            activations that AdaRound's observers watch. True for the defaults of `Refinement`. For 4-bit activations;
            with `Refinement(integers=True)`, which lets integers move too, for 2-bit weights.
        inputs: maps a batch to the model's inputs, such as `lambda batch: batch[0]` to drop labels.
        exclude: names (a parent's name covers its children), regular expressions on names, or module types. Excluded
            layers are rounded to nearest on their own grid.
        scale: `"observer"` keeps the observer's scale, `"search"` chooses scale and zero point under the layer's data;
            by default it searches for `AdaRoundObserver`, and keeps the scale of other observers and for `"nearest"`.
        asymmetric: imitate the float output from the quantized input, else from the same input.
        correct_bias: let biases absorb the mean error; a module without a bias gets one.
        column_weighting: `"none"`; `"inverse_norm"` for networks with massive activations; or `"fisher"`, by how much
            the network's output changes with the layer's there: one more forward and two backward passes.
        damping: ridge on the hessian relative to its mean diagonal.
            These four, where the preset leaves them open, are decided together by the error of the network's output on
            held-out samples, in trials on part of the data.
        rounding: `"grid"` lets an integer be any on the grid, `"up_or_down"` only floor or ceil, as in the paper.
        holdout: share of the samples kept out of learning (an eighth by default); a layer that is worse there than
            nearest keeps nearest, a block that is worse than its start keeps its start.
        max_columns: at most about this many columns of a layer's design matrix enter its moments, or four per weight
            of an output channel where that is more.
        backend_config: the one given to `prepare_fx`, if any (the weight-only one is recognized).
        progress: show a progress bar.
        seed: shifts the subsample of columns; a `Relaxation` has a seed of its own. The same seeds, data and machine
            give the same integers.
        inplace: change `prepared` itself instead of a deep copy.

    Returns:
        The prepared model with learned weights, biases and frozen weight observers, to be converted by the host;
        `get_report` reads what was done.

    Raises:
        InvalidOptionError: an option is out of range, a name in `exclude` or `blocks` matches nothing, or blocks
            share a layer or have no single end.
        InvalidModelError: not prepared, not calibrated, in train mode, not float32, or nothing to quantize.
        InvalidBatchError: no batches, or one that does not fit the model or lies on another device.
        NonFiniteError: NaN or infinity in weights or activations; the layer is named.
    """
    start = time.perf_counter()
    given = {"solver": solver, "blocks": blocks, "scale": scale, "rounding": rounding, "holdout": holdout}
    imitated: dict[str, Any] = {"asymmetric": asymmetric, "correct_bias": correct_bias}
    imitated |= {"column_weighting": column_weighting, "damping": damping}
    options = resolve(preset, given | imitated)
    _check_choices(options)
    _check_numbers(options["holdout"], max_columns, options["damping"], seed)
    if backend_config is not None and not isinstance(backend_config, BackendConfig):
        raise InvalidOptionError("backend_config", f"{backend_config!r} is none", "Pass a torch.ao BackendConfig.")
    if not isinstance(refine, bool | Refinement):
        raise InvalidOptionError("refine", f"{refine!r} is not known", "Pass True, False or a Refinement.")
    chosen, relaxation = _solvers(options["solver"], options["blocks"])
    host = open_host(prepared, backend_config)
    frozen = _excluded(host, exclude)
    grouped = _blocks(host, options["blocks"])
    bound = bind_batches(host.prepared, host.signature, host.flatten, batches, inputs)
    sampling = Sampling.of(bound, options["holdout"], max_columns, seed)
    imitated = {name: options[name] for name in imitated}
    plain = isinstance(chosen, Nearest) and relaxation is None
    recipes = _recipes(plain, sampling.total, imitated)
    if plain and options["scale"] == "auto":
        options["scale"] = "observer"
    settings = Settings(
        *(chosen, recipes[0], options["scale"], options["rounding"] == "up_or_down", frozen),
        relaxation=relaxation,
        refinement=Refinement() if refine is True else refine or None,
        blocks=grouped,
    )
    setup = time.perf_counter() - start
    with (
        torch.no_grad(),
        tqdm(total=len(host.nodes) - len(frozen), desc="AdaRound", unit="layer", disable=not progress) as bar,
    ):
        trials: list[RecipeTrial] = []
        if len(recipes) > 1 and len(frozen) < len(host.nodes):
            bar.set_postfix_str("choosing a recipe")
            recipe, trials = _try(host, bound, recipes, settings, options["holdout"], seed, imitated)
            settings = replace(settings, recipe=recipe)
        tried = time.perf_counter() - start - setup

        def show(layer: LayerReport) -> None:
            bar.set_postfix_str(f"{layer.name} {layer.nearest_error:.2e} -> {layer.learned_error:.2e}", refresh=False)
            bar.update()

        def show_step(name: str, iteration: int, loss: float) -> None:
            bar.set_postfix_str(f"{name} step {iteration}, {loss:.2f} of the error at the start")

        learner = Learner(host, bound, sampling, settings, show, show_step)
        bound.clear()
        learner.run()
        model = host.prepared if inplace else host.copy()
        host.write(model, learner.roundings, learner.scales)
    skipped = [*host.skipped, *_excluded_entries(host, frozen)]
    model.meta[KEY] = Report(
        solver=type(chosen if relaxation is None else relaxation).__name__,
        recipe=_describe(settings.recipe),
        layers=list(learner.reports.values()),
        skipped=[(entry.name, entry.kind, entry.reason) for entry in skipped],
        trials=trials,
        blocks=learner.block_reports,
        refinement=learner.refinement_report,
        output_error=learner.output_error,
        seconds={"setup": setup, **learner.seconds, "trials": tried, "total": time.perf_counter() - start},
    )
    return model


_CHOICES: dict[str, tuple[Any, ...]] = {
    "scale": ("auto", "observer", "search"),
    "rounding": ("grid", "up_or_down"),
    "column_weighting": ("auto", "none", "inverse_norm", "fisher"),
    "asymmetric": ("auto", True, False),
    "correct_bias": ("auto", True, False),
}


def _check_choices(options: dict[str, Any]) -> None:
    for name, choices in _CHOICES.items():
        if options[name] not in choices:
            raise InvalidOptionError(name, f"{options[name]!r} is not known", f"Pass one of {list(choices)}.")


def _check_numbers(holdout: Any, max_columns: Any, damping: Any, seed: Any) -> None:
    if not (isinstance(holdout, int | float) and 0 <= holdout <= 0.5):
        raise InvalidOptionError("holdout", f"{holdout!r} is not a share", "Pass a number from 0 to 0.5.")
    if not (isinstance(max_columns, int) and max_columns > 0):
        raise InvalidOptionError("max_columns", f"{max_columns!r} is not a positive integer", "Pass at least 1.")
    if damping != "auto" and not (isinstance(damping, int | float) and damping > 0):
        raise InvalidOptionError("damping", f"{damping!r} is not positive", "Pass a positive number, or 'auto'.")
    if not isinstance(seed, int):
        raise InvalidOptionError("seed", f"{seed!r} is not an integer", "Pass an integer.")


def _solvers(solver: str | Solver, blocks: Any) -> tuple[Solver, Relaxation | None]:
    """The solver of each layer's rounding problem, and the relaxation on samples that follows, if any.

    Raises:
        InvalidOptionError: blocks without a relaxation on samples, which alone learns layers together.
    """
    chosen = get_solver(solver)
    if isinstance(chosen, Relaxation) and chosen.data == "samples":
        return chosen.start or Nearest(), chosen
    if blocks is not False:
        raise InvalidOptionError(
            *("blocks", f"{type(chosen).__name__} takes layers one by one"),
            "Pass a Relaxation as solver (preset='blocks' has one), or blocks=False.",
        )
    return chosen, None


def _blocks(host: Host, blocks: Any) -> tuple[Block, ...]:
    """What is learned together."""
    if isinstance(blocks, bool):
        return tuple(find_blocks(host)) if blocks else ()
    names = isinstance(blocks, Sequence) and not isinstance(blocks, str) and all(isinstance(one, str) for one in blocks)
    if not names or not blocks:
        raise InvalidOptionError("blocks", f"{blocks!r} has no names", "Pass True, False or a list of names.")
    return tuple(named_blocks(host, blocks))


def _excluded(host: Host, exclude: Exclude) -> frozenset[str]:
    """Names of the weighted nodes that the caller excludes."""
    if isinstance(exclude, str | type):
        exclude = (exclude,)
    if not isinstance(exclude, Iterable) or not all(isinstance(entry, str | type) for entry in exclude):
        raise InvalidOptionError(
            "exclude", f"{exclude!r} has no names or types", "Pass a list of names and module types."
        )
    node_of = {name: node.name for node in host.nodes for name in node.names}
    skipped = [entry.name for entry in host.skipped]
    found: set[str] = set()
    for entry in exclude:
        if isinstance(entry, str):
            found.update(node_of.get(name, "") for name in select(entry, [*node_of, *skipped], "exclude"))
        else:
            found.update(node.name for node in host.nodes if host.is_type(node, entry))
    return frozenset(found - {""})


def _excluded_entries(host: Host, frozen: frozenset[str]) -> list[Skipped]:
    reason = "excluded by the caller: rounded to nearest on its grid"
    return [Skipped(node.name, node.kind, reason) for node in host.nodes if node.name in frozen]


def _recipes(nearest: bool, samples: int, given: dict[str, Any]) -> list[Recipe]:
    """The recipes that the caller's options leave open, for learning from so many samples.

    The first two are the best measured on convolutional networks and on a transformer with massive activations; the
    asymmetric target and the corrected bias may overfit what few samples show, and the last two do without
    (docs/benchmarks.md). Fewer samples want more damping.
    """
    damping = 0.01 if samples >= _MANY_SAMPLES else 0.1
    # solver="nearest" is the baseline: nothing is imitated, so only what the caller asks for by name is done
    baseline = [Recipe(False, False, "none", damping)]
    learned = [
        Recipe(True, True, "none", damping),
        Recipe(True, True, "inverse_norm", damping),
        Recipe(False, True, "inverse_norm", damping),
        Recipe(False, False, "none", damping),
    ]
    candidates = baseline if nearest else learned
    given = {name: value for name, value in given.items() if value != "auto"}
    return list(dict.fromkeys(replace(candidate, **given) for candidate in candidates))


def _describe(recipe: Recipe) -> str:
    return (
        f"{'asymmetric' if recipe.asymmetric else 'symmetric'}, bias {'corrected' if recipe.correct_bias else 'kept'}, "
        f"column weighting {recipe.column_weighting}, damping {recipe.damping:g}"
    )


def _try(
    host: Host,
    bound: list[list[Any]],
    recipes: list[Recipe],
    settings: Settings,
    holdout: float,
    seed: int,
    options: dict[str, Any],
) -> tuple[Recipe, list[RecipeTrial]]:
    """Try recipes by sequential rounding on part of the data; the smallest error of the network's output wins."""
    total = Sampling.of(bound, 0, 1, 0).total
    part = bound[:: max(1, min(total // _TRIAL_SAMPLES, len(bound)))]
    sampling = Sampling.of(part, holdout, _TRIAL_COLUMNS, seed)
    trials = []
    for recipe in recipes:
        # damped as so few samples need it
        tried = replace(recipe, damping=0.1) if options["damping"] == "auto" else recipe
        quick = replace(
            settings, solver=GPTQ(), recipe=tried, judge=False, relaxation=None, refinement=None, blocks=()
        )
        learner = Learner(host, part, sampling, quick)
        learner.run()
        trials.append(RecipeTrial(_describe(tried), learner.output_error))
    best = min(range(len(recipes)), key=lambda i: trials[i].output_error)
    return recipes[best], trials
