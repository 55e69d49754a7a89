"""Fine-tune a text-to-image diffusion model with the memorization filter.

    python train_filtered.py --config configs/quickstart.yaml --filter.tau=4
"""

import sys


def main(argv: list[str] | None = None) -> int:
    from memfilter.arguments import parse
    from memfilter.cli import quiet_libraries, report_error
    from memfilter.config import ConfigError

    try:
        config = parse(sys.argv[1:] if argv is None else argv, __doc__)
    except ConfigError as error:
        return report_error(error)

    import logging

    quiet_libraries()
    from memfilter.data.shards import ShardError
    from memfilter.filter import EmptySteps, NonFiniteNorm
    from memfilter.pipelines import ModelError
    from memfilter.train.loop import train

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        train(config)
    except (ConfigError, ModelError, ShardError, NonFiniteNorm, EmptySteps) as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
