"""BentoML. Its batched calls take no raw body: rows travel as base64 in JSON. It chooses its wait by itself.

`bentoml serve bentoml_server:Model`.
"""

import base64

import bentoml
import numpy as np
import saved_model as model


@bentoml.service(workers=model.WORKERS, traffic={"timeout": 60, "max_concurrency": 4096})
class Model:
    """`{"rows": [base64]}` to `[base64]`."""

    def __init__(self):
        self.run = model.load()

    @bentoml.api(batchable=True, max_batch_size=model.BATCH)
    def predict(self, rows: list[str]) -> list[str]:
        """Run a batch."""
        answers = self.run(np.stack([model.row(base64.b64decode(each)) for each in rows]))
        return [base64.b64encode(answer.tobytes()).decode() for answer in answers]
