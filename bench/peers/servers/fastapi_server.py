"""FastAPI under uvicorn with a batcher written by hand: a queue, a task, and a thread that calls the model.

`uvicorn fastapi_server:app`; its settings are arguments. A batch is run in a thread, so that the loop
goes on receiving, once it waited for `WAIT_MS` or is full. Without a wait, what is there is run at once.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import saved_model as model
from fastapi import FastAPI, Request, Response

run = model.load()
queue: asyncio.Queue = asyncio.Queue()


async def gather():
    """The next batch: pairs of a row and the future of its answer."""
    loop = asyncio.get_running_loop()
    batch = [await queue.get()]
    until = loop.time() + model.WAIT_MS / 1e3
    while len(batch) < model.BATCH:
        try:
            batch.append(queue.get_nowait())
        except asyncio.QueueEmpty:
            left = until - loop.time()
            if left <= 0:
                break
            try:
                batch.append(await asyncio.wait_for(queue.get(), left))
            except asyncio.TimeoutError:
                break
    return batch


async def work(executor):
    """Run batches for ever."""
    loop = asyncio.get_running_loop()
    while True:
        batch = await gather()
        try:
            rows = np.stack([row for row, _ in batch])
            answers = await loop.run_in_executor(executor, run, rows)
        except Exception as e:
            for _, future in batch:
                if not future.done():
                    future.set_exception(e)
            continue
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)


@asynccontextmanager
async def lifespan(_):
    """Keep the task that runs batches."""
    with ThreadPoolExecutor(1) as executor:
        working = asyncio.create_task(work(executor))
        yield
        working.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/")
async def predict(request: Request):
    """One row in, its output out, both as raw float32."""
    future = asyncio.get_running_loop().create_future()
    queue.put_nowait((model.row(await request.body()), future))
    answer = await future
    return Response(answer.tobytes(), media_type="application/octet-stream")
