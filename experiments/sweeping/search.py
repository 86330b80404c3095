"""Optuna as the searcher: it proposes points, hears of every evaluation, and says which trials to stop early."""

from pathlib import Path
from typing import Any

from research.errors import UserError
from research.training.sweeps import Draw, Sweep


class Search:
    """Tree-structured Parzen estimator with median pruning; its storage is a journal in the sweep's workdir.

    Trials have the same numbers here and there, and a search that was interrupted knows all that it had heard.
    """

    def __init__(self, sweep: Sweep, directory: Path):
        try:
            import optuna
        except ImportError:
            raise UserError("--search=tpe: Optuna is not installed; pip install -e '.[sweep]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._sweep = optuna, sweep
        backend = optuna.storages.journal.JournalFileBackend(str(directory / "optuna.journal"))
        self._study = optuna.create_study(
            study_name="sweep",
            storage=optuna.storages.JournalStorage(backend),
            load_if_exists=True,
            direction="maximize" if sweep.maximize else "minimize",
            sampler=optuna.samplers.TPESampler(seed=sweep.seed, multivariate=True, constant_liar=True),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        )

    def __len__(self) -> int:
        """How many trials were proposed."""
        return len(self._study.trials)

    def propose(self) -> dict[str, Any]:
        """The point of the next trial."""
        trial = self._study.ask()
        return {name: _suggest(trial, name, draw) for name, draw in self._sweep.space.items()}

    def proposed(self, number: int) -> dict[str, Any]:
        """The point of a trial that was proposed before, by an earlier process perhaps."""
        trial = self._trial(number)
        return {name: _suggest(trial, name, draw) for name, draw in self._sweep.space.items()}

    def heard(self, number: int, evaluations: list[tuple[int, float]]) -> bool:
        """Tells a running trial's evaluations. Whether it should be stopped."""
        trial = self._trial(number)
        known = self._study.trials[number].intermediate_values
        for step, value in evaluations:
            if step not in known:
                trial.report(value, step)
        return bool(evaluations) and trial.should_prune()

    def finished(self, number: int, status: str, value: float | None) -> None:
        """Tells how a trial ended; a second time changes nothing."""
        states = self._optuna.trial.TrialState
        if self._study.trials[number].state.is_finished():
            return
        if status == "done" and value is not None:
            self._study.tell(number, value)
        else:
            self._study.tell(number, state=states.PRUNED if status == "pruned" else states.FAIL)

    def _trial(self, number: int) -> Any:
        return self._optuna.trial.Trial(self._study, self._study.trials[number]._trial_id)


def _suggest(trial: Any, name: str, draw: Draw) -> Any:
    if draw.choices:
        # Optuna's choices are plain values; a tuple is chosen by its place.
        return draw.choices[trial.suggest_categorical(name, list(range(len(draw.choices))))]
    if draw.integer:
        return trial.suggest_int(name, int(draw.low), int(draw.high), log=draw.log)
    return trial.suggest_float(name, draw.low, draw.high, log=draw.log)
