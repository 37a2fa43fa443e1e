"""Every private name of torch that the package touches, in one place."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, distributed, fx, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.nn.quantized.reference.modules.utils import ReferenceQuantizedModule
from torch.ao.quantization.fx.utils import assert_and_get_unique_device
from torch.ao.quantization.observer import _is_activation_post_process
from torch.ao.quantization.quantize_fx import _convert_to_reference_decomposed_fx as convert_to_decomposed_fx
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

__all__ = [
    "Convolution",
    "Dropout",
    "MoveListener",
    "Normalization",
    "convert_to_decomposed_fx",
    "export_inputs",
    "exports_forgotten",
    "flatten_inputs",
    "forget_models",
    "guards_of",
    "has_export_inputs",
    "is_guards",
    "is_observed",
    "is_observer",
    "is_quantized",
    "is_trained",
    "learnable_fake_quantize",
    "operator_name",
    "process_store",
    "returns_view",
    "share_attributes",
    "take_outs",
    "take_over",
    "tree_flatten",
    "tree_map",
    "tree_names",
    "tree_unflatten",
    "unflatten_inputs",
    "unfused",
    "unordered_signature",
    "weight_hooks",
]

Convolution = nn.modules.conv._ConvNd
Dropout = nn.modules.dropout._DropoutNd
Normalization = nn.modules.batchnorm._NormBase

# what a prepare step leaves in the meta of a graph
_ATTRIBUTES = "_observed_graph_module_attrs"
# the submodule that torch.export calls in front of a program, to check the shapes of its inputs
_GUARDS = "_guards_fn"

# a nested input as a list of its leaves and what is needed to put it together again, or leaf by leaf
tree_flatten, tree_unflatten, tree_map = pytree.tree_flatten, pytree.tree_unflatten, pytree.tree_map


def tree_names(structure: Any) -> list[str]:
    """Where each leaf of a nested input stands in it, as Python indexes it."""
    numbered = tree_unflatten(range(structure.num_leaves), structure)
    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(numbered)[0]]


@contextmanager
def exports_forgotten() -> Iterator[None]:
    """Exports with `strict` inside leave nothing in memory.

    torch puts what it traced, with all weights, into the globals of the module that it traces through, and leaves it
    there (seen in 2.13).
    """
    before = set(_exporting())
    try:
        yield
    finally:
        scope = _exporting()
        for name in [name for name in scope if name.startswith("__compiled_fn") and name not in before]:
            del scope[name]


def _exporting() -> dict[str, Any]:
    """The globals of torch's module of strict exports; empty where it was not imported."""
    module = sys.modules.get("torch._dynamo.functional_export")
    return {} if module is None else vars(module)


class MoveListener(nn.Module):
    """A module with a hook for moves and conversions of its tensors (`to`, `cuda`, `half`)."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> None:
        """Called with the function that was applied to every parameter and buffer."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.moved(fn)
        return self


def is_observed(module: nn.Module) -> bool:
    """Whether `module` is a graph that a prepare step returned, or a standalone module inside one."""
    return isinstance(module, fx.GraphModule) and _ATTRIBUTES in module.meta


def is_trained(prepared: fx.GraphModule) -> bool:
    """Whether a graph comes from a prepare step for training with fake quantization."""
    return bool(prepared.meta[_ATTRIBUTES].is_qat)


def is_observer(module: nn.Module) -> bool:
    """Whether `module` is an observer or fake-quantizer of torch.ao."""
    return bool(_is_activation_post_process(module))  # type: ignore[no-untyped-call]


def share_attributes(prepared: fx.GraphModule, sources: dict[fx.Node, fx.Node]) -> None:
    """Tell the host's convert of nodes that were added to a prepared graph: each has its source's qconfig and scope."""
    attributes = prepared.meta[_ATTRIBUTES]
    extended = {}
    for field in ("node_name_to_qconfig", "node_name_to_scope"):
        known = getattr(attributes, field)
        added = {node.name: known[source.name] for node, source in sources.items() if source.name in known}
        extended[field] = {**known, **added}
    # a new object: copies of a graph share the old one
    prepared.meta[_ATTRIBUTES] = replace(attributes, **extended)


def forget_models() -> None:
    """Let torch.ao's conversion, which remembers the device of each model, keep none of them in memory."""
    assert_and_get_unique_device.cache_clear()


def take_over(model: fx.GraphModule, changed: fx.GraphModule, entry: str) -> None:
    """Let a graph become a changed copy of itself: as a whole, or, where that is interrupted, not at all.

    Hooks, what a copy lacks, and all of `meta` but one entry stay what they are, and not copies. The copy is used up.
    """
    before, state = vars(model), {**vars(model), **vars(changed)}
    state.update({name: value for name, value in before.items() if "hooks" in name})
    own = {name: value for name, value in model.meta.items() if name in changed.meta.keys() - {_ATTRIBUTES, entry}}
    state["meta"] = {**changed.meta, **own}
    for name in ("_parameters", "_buffers", "_modules"):
        # a copy lacks what no node reads
        state[name] = {**before[name], **vars(changed)[name]}
    kind = type(model)
    changed.graph.owning_module = model
    try:
        object.__setattr__(model, "__dict__", state)
        # the code of its forward
        object.__setattr__(model, "__class__", type(changed))
    except BaseException:
        object.__setattr__(model, "__dict__", before)
        object.__setattr__(model, "__class__", kind)
        raise


def learnable_fake_quantize(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """Fake quantization with gradients by the value and, as in LSQ (arXiv 1902.08153), by the scale `()`."""
    offset = torch.tensor([float(zero_point)], dtype=torch.float32, device=x.device)
    found: Tensor = torch._fake_quantize_learnable_per_tensor_affine(
        x, scale.to(x.device).reshape(1), offset, low, high, 1.0
    )
    return found


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a reference module with one quantized weight."""
    return isinstance(module, ReferenceQuantizedModule)


def unfused(module: Any) -> Any:
    """The weighted module inside a fused one (convolution + ReLU, ...), or `module` itself."""
    return module[0] if isinstance(module, _FusedModule) else module


def weight_hooks(module: nn.Module) -> list[Callable[[], Any]]:
    """For each hook of torch's that computes a tensor of the module before a call, what takes the hook out."""
    found: list[Callable[[], Any]] = []
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            found.append(partial(remove_weight_norm, module, hook.name))
        elif isinstance(hook, SpectralNorm):
            found.append(partial(remove_spectral_norm, module, hook.name))
        elif isinstance(hook, prune.BasePruningMethod):
            found.append(partial(prune.remove, module, hook._tensor_name))
    return found


def operator_name(node: fx.Node) -> tuple[str, bool]:
    """Name of the function that a node calls, without its overload, and whether it is an ATen-like operator."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition(":")[2], True
    return getattr(node.target, "__name__", ""), False


def returns_view(node: fx.Node) -> bool:
    """Whether an operator's schema says that its result may be a view of an argument that it does not write to."""
    aliases = [returned.alias_info for returned in node.target._schema.returns]  # type: ignore[union-attr]
    return any(alias is not None and not alias.is_write for alias in aliases)


def take_outs(node: fx.Node) -> list[fx.Node]:
    """The values that a function is told to write its results into (`out=`); it is told no more."""
    if node.op != "call_function":
        return []
    names = ["out"]
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        names = [one.name for one in arguments if one.kwarg_only and one.alias_info is not None]
    given = [node.kwargs[name] for name in names if node.kwargs.get(name) is not None]
    if not given:
        return []
    node.kwargs = {name: value for name, value in node.kwargs.items() if name not in names}
    if isinstance(node.target, torch._ops.OpOverload):
        # the overload that returns its results
        node.target = node.target.overloadpacket
    outs = [out for value in given for out in (value if isinstance(value, list | tuple) else [value])]
    return [out for out in outs if isinstance(out, fx.Node)]


def export_inputs(program: fx.GraphModule) -> tuple[list[str], int]:
    """Names of the inputs of an exported program's module, and how many of them come first by position."""
    names = list(program.graph._codegen.pytree_info.orig_args)  # type: ignore[attr-defined]
    positional, _ = program._in_spec.children()
    return names, positional.num_children


def has_export_inputs(program: fx.GraphModule) -> bool:
    """Whether a graph takes its inputs as an exported program's module does."""
    return hasattr(program.graph._codegen, "pytree_info")


def is_guards(node: fx.Node) -> bool:
    """Whether a node of an exported program checks the shapes of the inputs."""
    return node.op == "call_module" and node.target == _GUARDS


def guards_of(program: fx.GraphModule) -> Callable[..., Any] | None:
    """What checks the shapes of an exported program's inputs with an `AssertionError`, if anything does."""
    found: Callable[..., Any] | None = getattr(program, _GUARDS, None)
    return found


def unordered_signature(parameters: Iterable[inspect.Parameter]) -> inspect.Signature:
    """A signature in which parameters with a default may come before those without, as torch's placeholders do."""
    return inspect.Signature(list(parameters), __validate_parameters__=False)


def flatten_inputs(program: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments as the placeholders of an exported program's module; `ValueError` if their structure differs."""
    _, keywords = program._in_spec.children()
    ordered = {name: kwargs[name] for name in keywords.context}
    leaves, found = pytree.tree_flatten((args, ordered))
    if found != program._in_spec:
        raise ValueError(f"its structure is {found}, but the program was exported with {program._in_spec}")
    return leaves


def unflatten_inputs(program: fx.GraphModule, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of what was exported, of placeholders of the program's module."""
    args, kwargs = tree_unflatten(leaves, program._in_spec)
    return args, kwargs


def process_store(name: str) -> Any:
    """Where processes of torch.distributed leave word for each other, once they are initialized, under a name."""
    c10d = distributed.distributed_c10d
    return c10d.PrefixStore(name, c10d._get_default_store())
