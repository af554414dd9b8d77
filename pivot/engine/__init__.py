"""All that knows DeepSpeed, and nothing else imports it.

`engine.py` runs a step, `settings.py` is what DeepSpeed is told, `schedule.py` the rates, `files.py` reads what it
wrote, `reshape.py` goes on with other ranks or another stage.
"""

from pivot.engine.engine import Engine
from pivot.engine.schedule import learning_rate_factor
from pivot.engine.settings import build_deepspeed_config, gathered, sharded_loading

__all__ = ["Engine", "build_deepspeed_config", "gathered", "learning_rate_factor", "sharded_loading"]
