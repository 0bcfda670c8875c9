"""A no-op task on each peer: `tasks.py PEER worker|client URL`, run in the peer's own environment.

Each peer is tuned for low latency as its documentation advises: short poll intervals where results are polled, enough
concurrency for the waiters, one worker process.
"""

import asyncio
import logging
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from client_loop import serve, serve_blocking

CONCURRENCY = 512
PAYLOAD = "x" * 200


def streaq(role: str, url: str) -> None:
    """streaQ on Redis Streams."""
    from streaq import Worker

    worker: Any = Worker(redis_url=url, concurrency=CONCURRENCY, prefetch=CONCURRENCY)

    @worker.task
    async def noop(payload: str) -> str:
        return payload

    async def client() -> None:
        async def cycle() -> None:
            task = await noop.enqueue(PAYLOAD)
            # `task.result()` takes 0.1 s to leave its subscription, so polling is the stronger baseline.
            while not await worker.redis.get(worker.results_key + task.id):  # noqa: ASYNC110
                await asyncio.sleep(0.002)

        async with worker:
            await serve(cycle)

    if role == "worker":
        worker.run_sync()
    else:
        asyncio.run(client())


async def _docket_noop(payload: str) -> str:
    return payload


def docket(role: str, url: str) -> None:
    """docket on Redis Streams."""
    from docket import Docket, Worker

    async def main() -> None:
        async with Docket(name="bench", url=f"{url}?max_connections=2048") as queue:
            queue.register(_docket_noop)
            if role == "worker":
                short = timedelta(milliseconds=5)
                async with Worker(queue, concurrency=CONCURRENCY, minimum_check_interval=short) as worker:
                    await worker.run_forever()

            async def cycle() -> None:
                execution = await queue.add(_docket_noop)(PAYLOAD)
                await execution.get_result()

            await serve(cycle)

    asyncio.run(main())


def taskiq(role: str, url: str) -> None:
    """taskiq with the Redis Streams broker."""
    from taskiq.api import run_receiver_task
    from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

    backend: Any = RedisAsyncResultBackend(redis_url=url, result_ex_time=60)
    broker = RedisStreamBroker(url=url).with_result_backend(backend)

    @broker.task(task_name="noop")
    async def noop(payload: str) -> str:
        return payload

    async def main() -> None:
        if role == "worker":
            broker.is_worker_process = True
            await broker.startup()
            await run_receiver_task(broker, max_async_tasks=CONCURRENCY)
            return
        await broker.startup()

        async def cycle() -> None:
            task = await noop.kiq(PAYLOAD)
            await task.wait_result(check_interval=0.002)

        await serve(cycle)

    asyncio.run(main())


async def noop(_context: Any, payload: str) -> str:
    """The task of arq and saq."""
    return payload


def arq(role: str, url: str) -> None:
    """arq, which polls for jobs and for results."""
    from arq import create_pool
    from arq.connections import RedisSettings
    from arq.worker import Worker

    settings = RedisSettings.from_dsn(url)

    async def worker() -> None:
        running: Any = Worker(
            [noop],
            redis_settings=settings,
            max_jobs=CONCURRENCY,
            poll_delay=0.005,
            keep_result=60,
            handle_signals=False,
        )
        await running.async_run()

    async def client() -> None:
        pool = await create_pool(settings)

        async def cycle() -> None:
            job = await pool.enqueue_job("noop", PAYLOAD)
            assert job is not None
            await job.result(poll_delay=0.002)

        await serve(cycle)

    asyncio.run(worker() if role == "worker" else client())


def saq(role: str, url: str) -> None:
    """saq, which waits for results by publish and subscribe."""
    from saq import Queue, Worker

    queue: Any = Queue.from_url(url)

    async def worker() -> None:
        await Worker(queue, functions=[("noop", _saq_noop)], concurrency=CONCURRENCY).start()

    async def client() -> None:
        await queue.connect()

        async def cycle() -> None:
            await queue.apply("noop", payload=PAYLOAD, poll_interval=0.002)

        await serve(cycle)

    asyncio.run(worker() if role == "worker" else client())


async def _saq_noop(_context: Any, *, payload: str) -> str:
    return payload


def celery(role: str, url: str) -> None:
    """Celery with Redis as broker and result backend."""
    from celery import Celery

    app = Celery("bench", broker=url, backend=url)
    app.conf.update(result_expires=60, worker_prefetch_multiplier=64, worker_hijack_root_logger=False)

    @app.task(name="noop")
    def noop_task(payload: str) -> str:
        return payload

    if role == "worker":
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        app.worker_main(["worker", "--pool=threads", "--concurrency=16", "--loglevel=ERROR", *quiet])
    else:
        serve_blocking(lambda: noop_task.delay(PAYLOAD).get(timeout=60))


def dramatiq(role: str, url: str) -> None:
    """dramatiq with Redis as broker and result backend."""
    import dramatiq as library
    from dramatiq.brokers.redis import RedisBroker
    from dramatiq.results import Results
    from dramatiq.results.backends import RedisBackend

    url = f"{url}?max_connections=2048"
    broker = RedisBroker(url=url)
    broker.add_middleware(Results(backend=RedisBackend(url=url), store_results=True, result_ttl=60_000))
    library.set_broker(broker)

    @library.actor(actor_name="noop")
    def noop_actor(payload: str) -> str:
        return payload

    if role == "worker":
        worker = library.Worker(broker, worker_threads=16, worker_timeout=100)
        worker.start()
        worker.join()
        asyncio.run(asyncio.Event().wait())
    else:
        serve_blocking(lambda: noop_actor.send(PAYLOAD).get_result(block=True, timeout=60_000))


def autogen(role: str, address: str) -> None:
    """AutoGen's gRPC runtime: a host, an agent runtime and a caller's runtime. It stores nothing."""
    from dataclasses import dataclass

    from autogen_core import AgentId, MessageContext, RoutedAgent, message_handler
    from autogen_core import try_get_known_serializers_for_type as serializers
    from autogen_ext.runtimes.grpc import GrpcWorkerAgentRuntime, GrpcWorkerAgentRuntimeHost

    @dataclass
    class Work:
        payload: str

    class NoOp(RoutedAgent):
        @message_handler
        async def on_work(self, message: Work, ctx: MessageContext) -> Work:
            return message

    async def main() -> None:
        if role == "host":
            host = GrpcWorkerAgentRuntimeHost(address)
            host.start()
            print('{"ready": true}', flush=True)
            await asyncio.Event().wait()
        runtime = GrpcWorkerAgentRuntime(address)
        await runtime.start()
        runtime.add_message_serializer(serializers(Work))
        if role == "worker":
            await NoOp.register(runtime, "noop", lambda: NoOp("no-op"))
            print('{"ready": true}', flush=True)
            await asyncio.Event().wait()
        target = AgentId("noop", "default")

        async def cycle() -> None:
            await runtime.send_message(Work(PAYLOAD), target)

        await serve(cycle)

    asyncio.run(main())


PEERS: dict[str, Callable[[str, str], None]] = {
    "streaq": streaq,
    "docket": docket,
    "taskiq": taskiq,
    "arq": arq,
    "saq": saq,
    "celery": celery,
    "dramatiq": dramatiq,
    "autogen": autogen,
}

if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    PEERS[sys.argv[1]](sys.argv[2], sys.argv[3])
