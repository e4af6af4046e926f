"""`python -m megamem.testing`: an ordinary Megatron script, written for GPUs and nccl, on two CPU processes."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
import torch
from megatron.core import parallel_state
assert __name__ == "__main__" and sys.argv[1:] == ["--flag", "value"], sys.argv
torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
torch.cuda.set_device(torch.distributed.get_rank() % torch.cuda.device_count())
parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
x = torch.ones(1).cuda()
torch.distributed.all_reduce(x, group=parallel_state.get_tensor_model_parallel_group())
print(f"[{x.item():g} on {torch.cuda.current_device()} {x.type()}]", flush=True)
torch.distributed.destroy_process_group()
"""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.megatron
@pytest.mark.slow
def test_a_script_for_gpus_runs_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = _run(*torchrun, "-m", "megamem.testing", str(script), "--flag", "value")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[2 on 0 torch.cuda.FloatTensor]" in done.stdout
    assert "[2 on 1 torch.cuda.FloatTensor]" in done.stdout


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from megamem.testing.__main__ import main; main(['--help'])"
    done = _run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "torchrun --nproc-per-node 2 -m megamem.testing" in done.stdout


@pytest.mark.parametrize(("module", "package"), [("torch", "torch"), ("megatron", "megatron-core")])
def test_what_is_missing_is_named_with_the_remedy(module: str, package: str) -> None:
    hide = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        f"def find(name, package=None): return None if name.split('.')[0] == {module!r} else real(name, package)\n"
        "u.find_spec = find\n"
        f"from megamem.testing.__main__ import main; main([{__file__!r}])"
    )
    done = _run("-c", hide)
    assert done.returncode == 2
    assert f"{package} is not installed; install it with: pip install 'megamem[train]'" in done.stderr


def test_a_missing_script_is_named() -> None:
    done = _run("-m", "megamem.testing", "no_such_script.py")
    assert done.returncode == 2
    assert "no_such_script.py is not a file" in done.stderr
