"""Rewrite a plain ONNX graph into canonical operators (see ``moeware.compiler.canonical``).

Each file holds the rules of one family. A rule proposes a canonical form from the structure
around an operator and proves it: layout by the places of numbered elements (`trace`), arithmetic
by running the region on random inputs (`region`). What no rule proves stays a plain ONNX node.
"""

import onnx_ir as ir
import onnx_ir.passes.common as passes

from moeware.compiler.canonical import DOMAIN, ROUTED, verify
from moeware.compiler.errors import CompileError
from moeware.compiler.fuse.attention import fuse_attention
from moeware.compiler.fuse.choice import rewrite_choice, rewrite_softmax
from moeware.compiler.fuse.contrib_moe import fuse_contrib_moe
from moeware.compiler.fuse.einsum import rewrite_einsum
from moeware.compiler.fuse.embed import (
    explain_lookups,
    fuse_constants,
    fuse_patch_embed,
    fuse_tokens,
)
from moeware.compiler.fuse.grids import attach_grids, collect_grids
from moeware.compiler.fuse.group_query import rewrite_group_query
from moeware.compiler.fuse.linear import (
    fold_output_scale,
    fuse_linear,
    fuse_multiply,
    split_linear,
)
from moeware.compiler.fuse.moe import fuse_moe
from moeware.compiler.fuse.norm import fuse_head_norm, fuse_norm
from moeware.compiler.fuse.pointwise import fuse_pointwise, lift_pointwise
from moeware.compiler.fuse.rebuild import straighten
from moeware.compiler.fuse.rotary import fuse_rotary
from moeware.compiler.fuse.scatter import rewrite_scatter
from moeware.compiler.fuse.shared import fuse_shared_expert
from moeware.compiler.fuse.soft_moe import fuse_soft_moe
from moeware.compiler.fuse.tokens import (
    fuse_add,
    fuse_mean,
    fuse_take_token,
    join_branches,
)

# Mixtures, norms and functions are proved on plain nodes, so they come before Linear. Norms of heads
# stand before or behind rotations; packed Linears are cut when rotations have found their pairs.
RULES = (
    rewrite_group_query,
    rewrite_softmax,
    rewrite_choice,
    fuse_moe,
    fuse_contrib_moe,
    fuse_soft_moe,
    rewrite_einsum,
    rewrite_scatter,
    fuse_norm,
    fuse_pointwise,
    fuse_linear,
    lift_pointwise,
    fold_output_scale,
    fuse_patch_embed,
    fuse_head_norm,
    fuse_rotary,
    fuse_head_norm,
    split_linear,
    fuse_multiply,
    fuse_shared_expert,
    fuse_attention,
    straighten,
    fuse_tokens,
    fuse_constants,
    fuse_mean,
    fuse_take_token,
    fuse_add,
    straighten,
    join_branches,
    explain_lookups,
)


def fuse(model: ir.Model) -> ir.Model:
    """Rewrite ``model`` (as returned by ``load``) in place into canonical operators; return it.

    Raises ``CompileError`` for graphs that are known to be silently wrong, and where the result
    does not pass ``canonical.verify``.
    """
    names = [value.name for value in model.graph.outputs]
    model.opset_imports[DOMAIN] = 1
    attach_grids(model)
    for rule in RULES:
        try:
            rule(model)
        except CompileError:
            raise
        except Exception as error:
            raise CompileError(
                f"Rule {rule.__name__} must leave a graph that it cannot read unchanged, not fail "
                f"with {type(error).__name__}: {error}; report the model, and export it with "
                f"another opset_version meanwhile"
            ) from error
        passes.RemoveUnusedNodesPass()(model)
    _finish(model, [str(name) for name in names])
    verify(model)
    return model


def _decide_late(model: ir.Model) -> None:
    """Put experts right before the Add that they join the stream by, and each Route right before its
    experts: a choice stands until the next router's, as the accelerator has one set of queues."""
    for operators in (ROUTED, ("Route",)):
        for node in list(model.graph):
            if node.domain != DOMAIN or node.op_type not in operators:
                continue
            readers = {reader for value in node.outputs for reader in value.consumers()}
            first = next((each for each in model.graph if each in readers), None)
            if first is not None:
                model.graph.remove(node)
                model.graph.insert_before(first, node)


def _finish(model: ir.Model, output_names: list[str]) -> None:
    """Order the nodes and name them by operator and number; keep the names of the outputs."""
    passes.TopologicalSortPass()(model)
    _decide_late(model)
    counts: dict[str, int] = {}
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        number = counts.get(node.op_type, 0)
        counts[node.op_type] = number + 1
        node.name = f"{node.op_type}_{number}"
        suffixes = (".indices", ".weights") if node.op_type == "Route" else ("",)
        for output, suffix in zip(node.outputs, suffixes):
            output.name = node.name + suffix
    for value, name in zip(model.graph.outputs, output_names):
        value.name = name
    passes.NameFixPass()(model)
    collect_grids(model)
