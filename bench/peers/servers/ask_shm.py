"""Ask a Triton server through system shared memory, and check the answer.

`python ask_shm.py HOST:PORT FILE`: sends row by row what FILE (`.npz`) has as `x`, wants its `y`.
"""

import sys

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import shared_memory as shm


def main():
    """Exit with 1 if an answer is wrong."""
    arrays = np.load(sys.argv[2])
    client = grpc.InferenceServerClient(sys.argv[1])
    x, want = arrays["x"], arrays["y"]
    sizes = {"in": x[:1].nbytes, "out": want[:1].nbytes}
    regions = {}
    try:
        for name, size in sizes.items():
            key = f"/pool-bench-ask-{name}"
            regions[name] = shm.create_shared_memory_region(name, key, size)
            client.register_system_shared_memory(name, key, size)
        given = grpc.InferInput("x", list(x[:1].shape), "FP32")
        given.set_shared_memory("in", sizes["in"])
        wanted = grpc.InferRequestedOutput("y")
        wanted.set_shared_memory("out", sizes["out"])
        for at in range(len(x)):
            shm.set_shared_memory_region(regions["in"], [x[at : at + 1]])
            client.infer("model", [given], outputs=[wanted])
            got = shm.get_contents_as_numpy(regions["out"], np.float32, want[:1].shape)
            if not np.allclose(got, want[at : at + 1], rtol=1e-3, atol=1e-3):
                sys.exit(f"row {at} is answered {got.ravel()[:10].tolist()}")
    finally:
        client.unregister_system_shared_memory()
        for region in regions.values():
            shm.destroy_shared_memory_region(region)


if __name__ == "__main__":
    main()
