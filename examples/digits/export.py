"""PyTorch to one ONNX file, written to a temporary name and moved into place."""
import os
from pathlib import Path

import torch


def export(model, path, *, batch=2, dynamic=True, **options):
    """Export `model` (image [batch, 1, 8, 8] -> logits [batch, 10]) in eval mode to `path`.

    `batch` is the batch size of the export's example input, at least 2 where `dynamic`: then the
    first dimension becomes the symbol "batch". `options` go to `torch.onnx.export`, for example
    `opset_version=23`. Weights stay inside the file. Source paths, which the exporter records on
    every node, are removed. The model's training mode is left as it was.
    """
    path = Path(path)
    training = model.training
    image = torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shapes = {"image": {0: torch.export.Dim("batch")}} if dynamic else None
    try:
        program = torch.onnx.export(
            model.eval(), (image,), input_names=["image"], output_names=["logits"],
            dynamic_shapes=shapes, dynamo=True, verbose=False, **options)
    finally:
        model.train(training)
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    program.save(temporary, external_data=False)
    os.replace(temporary, path)
