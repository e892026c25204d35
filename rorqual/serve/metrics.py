"""GET /metrics: what the server and its engine have done, as Prometheus text."""

from __future__ import annotations

from collections import Counter

from rorqual.serve.backend import Backend, EngineBackend

ROUTES = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}


class Metrics:
    def __init__(self, backend: Backend):
        self.backend = backend
        self._answers: Counter[tuple[str, int]] = Counter()

    def answered(self, path: str, status: int) -> None:
        # Unknown paths are one: a client must not be able to grow this table.
        self._answers[path if path in ROUTES else "other", status] += 1

    def render(self) -> str:
        lines = ["# TYPE rorqual_http_requests_total counter"]
        lines += [
            f'rorqual_http_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self._answers.items())
        ]
        if isinstance(self.backend, EngineBackend):
            for name, kind, value in self._engine(self.backend):
                lines += [f"# TYPE rorqual_{name} {kind}", f"rorqual_{name} {value}"]
        return "\n".join(lines) + "\n"

    def _engine(self, backend: EngineBackend) -> list[tuple[str, str, float]]:
        engine = backend.service.engine
        counters = engine.counters
        return [
            ("engine_steps_total", "counter", counters.steps),
            ("engine_computed_tokens_total", "counter", counters.computed_tokens),
            ("engine_sampled_tokens_total", "counter", counters.sampled_tokens),
            ("engine_finished_requests_total", "counter", counters.finished),
            ("engine_preemptions_total", "counter", counters.preemptions),
            ("engine_cached_tokens_total", "counter", counters.cached_tokens),
            ("engine_drafted_tokens_total", "counter", counters.drafted),
            ("engine_accepted_tokens_total", "counter", counters.accepted),
            ("engine_running_requests", "gauge", len(engine.scheduler.running)),
            ("engine_waiting_requests", "gauge", backend.service.num_waiting),
            ("engine_held_blocks", "gauge", engine.pool.num_held),
            ("engine_blocks", "gauge", engine.pool.num_blocks),
            ("engine_weights_version", "gauge", engine.version),
        ]
