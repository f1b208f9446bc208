"""What the server counts, as Prometheus reads it."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # bounds of the histograms


class Metrics:
    """The counters of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.responses = self.make(Counter, "requests", "Requests answered, by path and status", ["path", "status"])
        self.prompt_tokens = self.make(Counter, "prompt_tokens", "Tokens of prompts answered")
        self.cached_tokens = self.make(Counter, "cached_tokens", "Tokens of prompts that were not read again")
        self.new_tokens = self.make(Counter, "generation_tokens", "Tokens generated")
        self.waiting = self.make(Gauge, "requests_waiting", "Answers that wait for a row")
        self.running = self.make(Gauge, "requests_running", "Rows in use")
        self.rows = self.make(Gauge, "rows", "Rows there are")
        self.first = self.make(Histogram, "time_to_first_token_seconds", "From the request on", buckets=SECONDS)
        self.between = self.make(Histogram, "time_between_tokens_seconds", "Of one answer", buckets=SECONDS)

    def make(self, kind: type, name: str, text: str, labels: list[str] = (), **options):
        return kind(f"gpt_faster_{name}", text, labels, registry=self.registry, **options)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Counted:
    """Counts the responses of the paths that there are."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted)
