"""A whole recipe, in the paper's order: text, dense model, longer context, warm indexers, sparse model, post-training, a sample
of its text, and the page of the run (report.html).

Every stage works in its own directory below the run's and is skipped when it has finished, so a killed run goes on where it was.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from rorqual.data.store import TokenStore
from rorqual.errors import UserError
from rorqual.model.cache import Cache
from rorqual.model.transformer import Transformer
from rorqual.parallel.world import World
from rorqual.report import page
from rorqual.runlog import RunLog
from rorqual.stages import extend, post_training, prepare, pretrain, train_sparse, warm_indexer
from rorqual.stages.recipe import Recipe, SampleConfig
from rorqual.train.exhibits import CONTROL_STAGE, record_exhibits
from rorqual.train.export import MODEL, open_model
from rorqual.train.loop import Place, Site


def main(recipe: Recipe, directory: Path, world: World, quiet: bool = False) -> Path:
    """Run what is left to do of a recipe; the directory of the finished checkpoint, `directory`/model."""
    log = Site.open(directory, world, quiet).log
    log.begin(recipe)
    if world.is_main:
        prepare.main(recipe.prepare, directory / "data", log)
    world.barrier()
    store = TokenStore(directory / "data")

    def place(stage: str) -> Place:
        return Place.open(directory / stage, store, world, quiet)

    model = None
    if recipe.pretrain:
        model = pretrain.main(recipe.pretrain, recipe.model, place("pretrain"))
    if recipe.extend:
        model = extend.main(recipe.extend, _needed(model, "extend"), place("extend"))
    if recipe.warm_indexer:
        model = warm_indexer.main(recipe.warm_indexer, _needed(model, "warm_indexer"), place("warm-indexer"))
    if recipe.train_sparse:
        warm = _needed(model, "train_sparse")
        model = train_sparse.main(recipe.train_sparse, warm, place("train-sparse"))
        if recipe.control:
            train_sparse.main(replace(recipe.train_sparse, dense=True), warm, place(CONTROL_STAGE))
    if recipe.post_training:
        model = post_training.main(recipe.post_training, _needed(model, "post_training"), directory, world, log, quiet)
    if world.is_main:
        _publish(_needed(model, "model"), directory / MODEL)
        show_samples(open_model(directory / MODEL), store, recipe.sample, log)
        record_exhibits(directory, directory / MODEL, log, recipe.exhibits, world.device)
        page.write(directory)
    world.barrier()
    return directory / MODEL


def show_samples(model: Transformer, store: TokenStore, config: SampleConfig, log: RunLog) -> None:
    """Continue each prompt greedily; the texts go to the log."""
    for prompt in config.prompts:
        tokens = [store.ends[0], *store.tokenizer.encode(prompt, add_special_tokens=False).ids]
        text = store.tokenizer.decode(continue_greedily(model.eval(), tokens, config.max_tokens))
        log.event("sample", prompt=prompt, text=text)


@torch.no_grad()
def continue_greedily(model: Transformer, tokens: list[int], count: int) -> list[int]:
    """The likeliest `count` tokens after `tokens`, one by one (ties to the lowest id)."""
    cache, fresh, out = Cache(model.config), tokens, []
    while len(out) < count:
        logits = model(torch.tensor([fresh]), cache=cache)[0, -1]
        fresh = [int(logits.argmax())]
        out += fresh
    return out


def _needed(model: Path | None, stage: str) -> Path:
    if model is None:
        raise UserError(f"{stage} needs a checkpoint, and no earlier stage of the recipe makes one; add a table [pretrain]")
    return model


def _publish(model: Path, final: Path) -> None:
    """The last stage's checkpoint under the run's own name, all or nothing."""
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(model, part)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
