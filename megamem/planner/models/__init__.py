"""Where models come from: a name, a Hugging Face `config.json`, a Megatron-Bridge YAML, or Megatron's own flags.

load_model("llama3-8b")          a row of `data/models.yaml`
load_model("config.json")        what Hugging Face publishes with every model
job_of_flags("--num-layers 32 --hidden-size 4096 ...")   a launch line of Megatron-LM
job_of_yaml("run.yaml")          a configuration of Megatron-Bridge, or Megatron-LM's MODEL_ARGS
"""

from megamem.planner.models.bridge import job_of_yaml as job_of_yaml
from megamem.planner.models.flags import flags_of as flags_of
from megamem.planner.models.flags import job_of_flags as job_of_flags
from megamem.planner.models.presets import load_model as load_model
from megamem.planner.models.presets import names as names

__all__ = ["flags_of", "job_of_flags", "job_of_yaml", "load_model", "names"]
