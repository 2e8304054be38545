"""The residual stream: embedding, additions, single tokens."""

import dataclasses

import numpy as np

from moeware.compiler.canonical import shape
from moeware.compiler.errors import CompileError
from moeware.compiler.quantise.state import Embedding, State
from moeware.compiler.weights import Tensor
from moeware.hw.arch import quantised as q

__all__ = ["Stream"]


class Stream(State):
    """Rules for PatchEmbed, ClassToken, AddConstant, Add and TakeToken."""

    def _PatchEmbed(self, node, height, width, ph, pw, **_):
        rows = (height // ph) * (width // pw)
        channels = shape(node.inputs[1])[0]
        self.values[node.outputs[0].name] = Embedding(np.zeros((rows, channels)), 0, node)

    def _ClassToken(self, node):
        start = self.values[node.inputs[0].name]
        if not isinstance(start, Embedding):
            raise CompileError(f"Node {node.name!r} must follow the patch embedding")
        token = self._constants(node)[0]
        self.values[node.outputs[0].name] = Embedding(
            np.vstack([token[None], start.constant]), start.first_row + 1, start.patches)

    def _AddConstant(self, node):
        start = self.values[node.inputs[0].name]
        if not isinstance(start, Embedding):
            raise CompileError(f"Node {node.name!r} must follow the patch embedding")
        self.values[node.outputs[0].name] = Embedding(
            start.constant + self._constants(node)[0], start.first_row, start.patches)

    def _emit_embedding(self, name: str, start: Embedding) -> Tensor:
        node = start.patches
        constant = np.clip(np.rint(start.constant / self.stream_step), -32768, 32767)
        self._add(q.Constant(name=node.name, output=f"{name}/constant",
                             value=constant.astype(np.int16)))
        self._add_linear(node, name, self.stream_step, residual=f"{name}/constant",
                         first_row=start.first_row)
        tensor = Tensor(name, self.stream_step, rows=len(start.constant))
        self.values[name] = tensor
        return tensor

    def _Add(self, node):
        branch = next((v for v in node.inputs if v.name in self.pending), None)
        if branch is None:
            raise CompileError(f"Node {node.name!r} must add a Linear or Experts to the stream")
        other = node.inputs[0] if branch is node.inputs[1] else node.inputs[1]
        stream, name = self._tensor(other), node.outputs[0].name
        source_node = self.pending.pop(branch.name)
        if source_node.op_type == "Linear":
            self._add_linear(source_node, name, self.stream_step, residual=stream.tensor)
        elif source_node.op_type == "SoftExperts":
            self._soft_experts(source_node, stream, name)
        else:
            self._experts(source_node, stream, name)
        self.values[name] = Tensor(name, self.stream_step, rows=stream.rows)
        self.added[branch.name] = name, stream.tensor

    def _TakeToken(self, node, index):
        value, name = node.inputs[0], node.outputs[0].name
        if value.name in self.norms:
            # Only the row that is used gets normalised.
            self._note_row(value.name, name)
            self.values[name] = self._norm(value.name, name, index, 1)
            return
        source = self._tensor(value)
        self.values[name] = dataclasses.replace(source, first_row=source.first_row + index, rows=1)

    def _note_row(self, norm: str, row: str) -> None:
        """A row of a normalised tensor that has a grid of its own in the file."""
        whole, grid = (self.kept.grids.get(name) for name in (norm, row))
        if grid is not None and whole is not None:
            same = dataclasses.replace(whole, names=grid.names) == grid
            reason = "" if same else "its rows have the grid of the normalised tensor"
            self.kept.note(grid.names, reason)
