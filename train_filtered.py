"""Fine-tune a text-to-image diffusion model with the memorization filter.

Example: `python train_filtered.py --config configs/evidence.yaml`. Exit codes: 0 done; 1 an error, which is printed; 75
interrupted by SIGTERM or SIGUSR1 after a checkpoint was made, go on with --checkpoint.resume=true. What starts several processes
(torchrun, accelerate launch) makes 1 of a 75.
"""

import os
import sys
import time


def main(argv: list[str] | None = None) -> int:
    try:
        return _main(argv)
    except ModuleNotFoundError as error:
        from memfilter.cli import EXTRAS, report_missing

        return report_missing(error, "train" if (error.name or "").partition(".")[0] in EXTRAS else None)


def _main(argv: list[str] | None) -> int:
    from memfilter.arguments import parse
    from memfilter.cli import quiet_libraries, report_error
    from memfilter.config import ConfigError

    try:
        config = parse(sys.argv[1:] if argv is None else argv, __doc__)
    except ConfigError as error:  # every process finds the same, and the first of a host tells
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(30)  # launchers end the others as soon as one has failed, and it might not have told yet
            return 1
        return report_error(error)

    import logging

    quiet_libraries()
    from memfilter.data.shards import ShardError
    from memfilter.files import is_full
    from memfilter.filter import EmptySteps, NonFiniteNorm
    from memfilter.pipelines import ModelError
    from memfilter.processes import end_processes
    from memfilter.train.checkpoint import CheckpointError
    from memfilter.train.interruption import EXIT_CODE, Interrupted
    from memfilter.train.loop import train

    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(asctime)s %(message)s")
    code = 0
    try:
        train(config)
    except Interrupted as stop:
        if first:
            print(stop, file=sys.stderr)
        code = EXIT_CODE
    except (ConfigError, ModelError, ShardError, NonFiniteNorm, EmptySteps, CheckpointError) as error:
        return report_error(error)
    except OSError as error:
        if not is_full(error):
            raise
        return report_error(error)
    end_processes()
    return code


if __name__ == "__main__":
    sys.exit(main())
