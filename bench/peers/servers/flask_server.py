"""Flask under gunicorn, without batching: a request is a call of the model.

`gunicorn flask_server:app`; its settings are arguments.
"""

import saved_model as model
from flask import Flask, request

app = Flask(__name__)
run = model.load()


@app.post("/")
def predict():
    """One row in, its output out, both as raw float32."""
    return run(model.row(request.get_data())[None]).tobytes(), {"Content-Type": "application/octet-stream"}
