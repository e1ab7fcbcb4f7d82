"""What an engine's sampler sees in each step."""

from sinkprune_plugin.sampling.batch_table import Column


class Recorder:
    """Keeps what the sampler of an engine projects: (table line, canvas, columns, logits) of each step of one request.

    :param engine: an engine in this process
    """

    def __init__(self, engine):
        core = engine.llm_engine.engine_core.engine_core
        self.batched = core.model_executor.driver_worker.worker.model_runner.sampler.batched
        self.steps = []

    def __enter__(self):
        sampler, head = self.batched, self.batched._head
        self.head = head

        def gather(hidden, before, batch):
            line = batch.table[0].cpu()
            slot, rows = int(line[Column.SLOT]), int(line[Column.ROWS])
            columns = sampler.state.order[slot, :rows].long().cpu()
            self.steps.append([line, sampler.state.canvas[slot].cpu().clone(), columns, None])
            return type(sampler).gather(sampler, hidden, before, batch)

        def recording(hidden):
            logits = head(hidden)
            self.steps[-1][3] = logits.float().cpu().clone()
            return logits

        sampler.gather, sampler._head = gather, recording
        return self

    def __exit__(self, *_):
        del self.batched.gather
        self.batched._head = self.head
