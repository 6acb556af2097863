"""What runs exported models does to the process that it runs in."""

import subprocess
import sys

PROGRAM = """
import gc, signal, subprocess, sys
import numpy as np
from onnx import TensorProto, helper
from gac.export.engines import open_model

x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "xy")
graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "sum", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
programs = [open_model("openvino", model.SerializeToString())[1] for _ in range(3)]
assert programs[0](np.ones((1, 2), np.float32))[0].tolist() == [[2.0, 2.0]]
for place in (2, 0, 0):
    del programs[place]
    gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("a child ended"))
subprocess.run([sys.executable, "-c", ""], check=True)
"""


def test_signals_do_no_harm_after_openvino() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "a child ended\n"), result.stderr
