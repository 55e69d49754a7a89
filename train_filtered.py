"""Fine-tune a text-to-image diffusion model with the memorization filter.

    python train_filtered.py --config configs/quickstart.yaml --filter.tau=4
"""

import re
import sys


def main(argv: list[str] | None = None) -> int:
    from jsonargparse import ArgumentParser

    from memfilter.config import Config

    parser = ArgumentParser(description=__doc__, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(Config, as_group=False)
    # YAML's infinity is .inf; people and sweeps write inf
    arguments = sys.argv[1:] if argv is None else argv
    parsed = parser.parse_args([re.sub(r"^((?:--[\w.]+=)?-?)(inf|nan)$", r"\1.\2", a) for a in arguments])
    parsed.pop("config", None)
    config = Config(**vars(parser.instantiate(parsed)))

    import logging

    from memfilter.cli import quiet_libraries, report_error

    quiet_libraries()
    from memfilter.config import ConfigError
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
