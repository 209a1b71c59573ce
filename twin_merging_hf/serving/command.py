"""`twin-merging serve`: export, engine and front, until a signal ends it."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from twin_merging_hf.errors import require_extra
from twin_merging_hf.export import export_vllm

from .engine import engine_command, free_port, keep_running
from .limits import Limits
from .served import Served, read_served


def serve(
    source: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    upstreams: Sequence[str] = (),
    engine: str = "vllm",
    engine_options: Sequence[str] = (),
    limits: Limits | None = None,
    drain_seconds: float = 60.0,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """
    Serve an artifact, or what `export --format vllm` made of it, until SIGINT or SIGTERM; requests at work are finished first.

    Args:
        source: folder of an artifact (exported to a temporary folder first) or of an export.
        upstreams: engines that run already, such as http://127.0.0.1:8001, which know all adapters and the shared model as
            `base`; without them vLLM is started and kept running here.
        engine: vLLM's program. engine_options: more of its options.
        limits: `Limits` of the front.
        drain_seconds: longest wait for requests at work after a signal.

    Raises:
        TwinMergingError: no artifact that vLLM can serve, no engine, starlette, uvicorn or prometheus-client not installed.
    """
    for module in ("starlette", "uvicorn", "httpx", "prometheus_client"):
        require_extra(module, "serve")
    from .front import make_app
    from .metrics import Metrics
    from .router import PromptRouter
    from .server import make_server, run
    from .upstreams import Upstreams

    limits = limits or Limits()
    metrics = Metrics()
    with _served(source, say) as (served, scratch):
        keep = None
        if not upstreams:
            engine_port = free_port()
            command = engine_command(served, engine, engine_port, engine_options)
            upstreams = [f"http://127.0.0.1:{engine_port}"]
            keep = partial(keep_running, command, scratch / "engine.log", say)
        pool = Upstreams(upstreams, served.models, limits.seconds, observe=metrics.failed)
        router = PromptRouter(served.router, metrics.batch)
        app = make_app(served, router, pool, metrics, limits, keep)
        say(f"http://{host}:{port}/v1 routes to {', '.join(served.experts)} on {', '.join(u.name for u in pool.all)}")
        if keep is not None:
            say(f"the engine is starting; its messages: {scratch / 'engine.log'}; /health tells when it is ready")
        run(make_server(app, host, port, limits.read_seconds, drain_seconds))


@contextlib.contextmanager
def _served(source: Path, say: Callable[[str], None]) -> Iterator[tuple[Served, Path]]:
    """The export to serve, and a folder for what lasts only as long."""
    with tempfile.TemporaryDirectory(prefix="twin-merging-serve-") as folder:
        scratch = Path(folder)
        served = read_served(source)
        if served is None:
            say(f"exporting {source} for vLLM; `twin-merging export --format vllm` saves doing it each time")
            export_vllm(source, scratch / "export")
            served = read_served(scratch / "export")
        assert served is not None
        yield served, scratch
