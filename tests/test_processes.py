"""Many processes and machines: torchrun trains as one process does, and goes on when one of its processes dies."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from pytest import approx

import checkpoints
import image_files
import weights
from config import Config
from config_improved import ImprovedConfig
from helpers import REPOSITORY, write_set
from runs import free_port, in_processes, log_lines, same_checkpoints, small_runs
from runtime import Poll, Runtime

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def settings(place):
    make = small_runs(Config, place)
    return lambda **changes: make(
        **{"batch_size": 8, "learning_rate": 1e-4, "epochs": 2, "steps_per_epoch": 10, "eval_every": 10, "save_every": 20, **changes}
    )


def options(config):
    """Settings as a command line."""
    given = {name: getattr(config, name) for name in config.__dataclass_fields__ if getattr(config, name) != getattr(type(config), name)}
    arguments = []
    for name, value in given.items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return arguments


class Torchrun:
    """One torchrun agent with its processes, which are found again by a variable in their environment."""

    def __init__(self, config, *arguments, script="train.py"):
        self.mark = f"RCAN_TEST={uuid.uuid4()}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RCAN_TEST": self.mark.split("=")[1]}
        command = [sys.executable, "-m", "torch.distributed.run", *arguments, str(REPOSITORY / script), *options(config)]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def ranks(self):
        """Process ids by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            ranks = [line[5:] for line in environment if line.startswith("RANK=")]
            if self.mark in environment and ranks:
                found[int(ranks[0])] = int(folder.name)
        return found

    def finish(self, timeout=120):
        """Exit code and what was said."""
        try:
            said, _ = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
            for pid in self.ranks().values():
                os.kill(pid, signal.SIGKILL)
        return self.process.returncode, said


def torchrun(config, count, **options):
    code, said = Torchrun(config, "--standalone", "--nproc_per_node", str(count), **options).finish()
    assert code == 0, said
    return said


def wait_for_update(config, update, seconds=90):
    log = config.experiment_dir / "log.jsonl"
    for _ in range(10 * seconds):
        lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
        if any(json.loads(line)["update"] >= update for line in lines if line.endswith("\n")):
            return
        time.sleep(0.1)
    raise AssertionError(f"no update {update} after {seconds} s")


def scores(config):
    return [line for line in log_lines(config) if line.get("event") == "evaluation"]


def assert_near(one, other):
    """The same losses and scores but for rounding, which the processes' sums have in another order."""
    losses = [[line["loss/l1"] for line in log_lines(config) if "loss/l1" in line] for config in (one, other)]
    assert losses[1] == approx(losses[0], rel=1e-3)
    assert len(scores(one)) == len(scores(other)) > 0
    for alone, together in zip(scores(one), scores(other), strict=True):
        numbers = [name for name in alone if name != "event"]
        assert [together[name] for name in numbers] == approx([alone[name] for name in numbers], rel=2e-3)


@pytest.fixture(scope="module")
def alone(settings):
    import train

    config = settings(exp_name="alone", valid_sets=("Valid", "Train"))
    assert train.train(config, train.PixelStep)
    return config


@pytest.fixture(scope="module")
def two(settings):
    config = settings(exp_name="two", valid_sets=("Valid", "Train"))
    torchrun(config, 2)
    return config


def test_one_with_eight_patches_is_two_with_four_is_four_with_two(settings, alone, two):
    four = settings(exp_name="four", valid_sets=("Valid", "Train"))
    torchrun(four, 4)
    assert_near(alone, two)
    assert_near(alone, four)
    for sheet in sorted((alone.experiment_dir / "samples").iterdir()):  # of the same images, whichever process has scored them
        pixels, others = (
            image_files.read_image(folder / sheet.name).astype(int) for folder in (sheet.parent, two.experiment_dir / "samples")
        )
        assert pixels.shape == others.shape == (2 * 286, 3 * 260, 3)
        assert abs(pixels - others).mean() < 1


GRADIENT = """
import json, os, sys, torch, train
from config import Config
from runtime import run_script, start_runtime
def main():
    build, runtime = train.build_generator, start_runtime()
    train.build_generator = lambda config: build(config).double()
    torch.manual_seed(0)
    step = train.PixelStep(eval(sys.argv[1]), runtime, "fp32")
    torch.manual_seed(1)
    lr, gt = torch.rand(8, 3, 10, 10).double(), torch.rand(8, 3, 20, 20).double()
    share = slice(runtime.rank * 8 // runtime.world_size, (runtime.rank + 1) * 8 // runtime.world_size)
    step(lr[share], gt[share])
    print(json.dumps([parameter.grad.flatten().tolist() for parameter in step.generator.parameters()]))
run_script(main)
"""


def test_the_gradient_of_two_processes_is_that_of_one(settings):
    """In float64, so that any CPU agrees; both processes have the very same."""
    config = repr(settings(clip_grad_norm=0.0))
    (whole,), (first, second) = (in_processes(GRADIENT, config, count=count) for count in (1, 2))
    assert first == second
    for one, other in zip(json.loads(whole), json.loads(first), strict=True):
        assert other == approx(one, rel=1e-6, abs=1e-12)


def test_checkpoints_carry_over_between_numbers_of_processes(settings, alone):
    import train

    grown, shrunk = (settings(exp_name=name, epochs=1, valid_sets=("Valid", "Train")) for name in ("grown", "shrunk"))
    assert train.train(grown, train.PixelStep)
    torchrun(settings(exp_name="grown", valid_sets=("Valid", "Train")), 2)
    torchrun(shrunk, 2)
    assert train.train(settings(exp_name="shrunk", valid_sets=("Valid", "Train")), train.PixelStep)
    assert_near(alone, grown)
    assert_near(alone, shrunk)


def test_accumulation_on_two_processes_is_the_plain_run(settings, alone):
    parts = settings(exp_name="parts", accumulation_steps=2, activation_checkpointing=True, valid_sets=("Valid", "Train"))
    torchrun(parts, 2)
    assert_near(alone, parts)


def two_machines(config, *arguments):
    """Two agents of one process each, which meet as those of two machines do."""
    rendezvous = [f"--rdzv_endpoint=127.0.0.1:{free_port()}", f"--rdzv_id={config.exp_name}", "--local_addr=127.0.0.1"]
    return [Torchrun(config, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", *rendezvous, *arguments) for _ in range(2)]


def test_two_machines_are_two_processes(settings, two):
    config = settings(exp_name="machines", valid_sets=("Valid", "Train"))
    agents = two_machines(config)
    ended = [agent.finish() for agent in agents]
    assert [code for code, _ in ended] == [0, 0], ended
    assert same_checkpoints(two.experiment_dir / "last.pth.tar", config.experiment_dir / "last.pth.tar", "/provenance/command") == []
    assert log_lines(two) == log_lines(config)


LONG = {"epochs": 8, "eval_every": 100, "save_every": 30, "log_every": 4, "steps_per_epoch": 20}  # 160 updates


def test_a_process_that_dies_ends_the_others(settings, rank=1):
    config = settings(exp_name="dies", **{**LONG, "epochs": 10000})
    agent = Torchrun(config, "--standalone", "--nproc_per_node", "2")
    wait_for_update(config, 40)
    assert agent.ranks().keys() == {0, 1}
    os.kill(agent.ranks()[rank], signal.SIGKILL)
    code, said = agent.finish(timeout=60)
    assert code == 1, said
    assert not agent.ranks()
    assert weights.read(config.experiment_dir / "last.pth.tar")["update"] >= 30


@pytest.fixture(scope="module")
def whole(settings):
    config = settings(exp_name="whole", **LONG)
    torchrun(config, 2)
    return config


def run_and_kill(config, rank, update, **options):
    """Kill one of two processes after an update; what the run said until its end."""
    agent = Torchrun(config, "--standalone", "--nproc_per_node", "2", "--max-restarts", "2", **options)
    wait_for_update(config, update)
    os.kill(agent.ranks()[rank], signal.SIGKILL)
    code, said = agent.finish()
    assert code == 0, said
    return said


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_again_from_the_last_checkpoint(settings, whole, rank):
    """… to the very run that two processes make that nobody kills."""
    config = settings(exp_name=f"killed{rank}", **LONG)
    assert f"{config.experiment_dir / 'last.pth.tar'}: update " in run_and_kill(config, rank, 70)
    assert same_checkpoints(whole.experiment_dir / "last.pth.tar", config.experiment_dir / "last.pth.tar", "/provenance/command") == []
    assert log_lines(whole) == log_lines(config)
    assert [line["update"] for line in log_lines(config) if "loss/l1" in line] == list(range(4, 161, 4))


def test_a_composite_run_starts_again_with_equal_weights(place):
    make = small_runs(ImprovedConfig, place)
    changes = {
        "model_arch_name": "rcan_cbam_x2", "use_composite_loss": True, "vgg19_weights_path": "random", "perceptual_layers": ("conv1_2",),
        "discriminator_channels": 4, "lr_patch_size": 16, "small_images": "skip", "best_metric": "newest",
        "epochs": 20, "eval_every": 20, "save_every": 9,
    }  # fmt: skip
    whole, config = make(exp_name="composite", **changes), make(exp_name="composite_killed", **changes)
    torchrun(whole, 2, script="train_improved.py")
    run_and_kill(config, 1, 14, script="train_improved.py")
    assert same_checkpoints(whole.experiment_dir / "last.pth.tar", config.experiment_dir / "last.pth.tar", "/provenance/command") == []
    assert log_lines(whole) == log_lines(config)


def test_two_machines_start_again_when_a_process_of_one_dies(settings, whole):
    config = settings(exp_name="machines_killed", **LONG)
    agents = two_machines(config, "--max-restarts", "2")
    wait_for_update(config, 70)
    (pid,) = agents[1].ranks().values()
    os.kill(pid, signal.SIGKILL)
    ended = [agent.finish() for agent in agents]
    assert [code for code, _ in ended] == [0, 0], ended
    assert any(f"{config.experiment_dir / 'last.pth.tar'}: update " in said for _, said in ended)
    assert same_checkpoints(whole.experiment_dir / "last.pth.tar", config.experiment_dir / "last.pth.tar", "/provenance/command") == []
    assert log_lines(whole) == log_lines(config)


def test_two_processes_save_by_time(settings):
    config = settings(exp_name="by_time", **{**LONG, "epochs": 10000, "save_every": 10**6, "eval_every": 10**6, "keep_last": 3})
    config = dataclasses.replace(config, save_every_minutes=0.01)
    agent = Torchrun(config, "--standalone", "--nproc_per_node", "2")
    last, seen = config.experiment_dir / "last.pth.tar", set()
    for _ in range(900):
        if last.exists():
            seen.add(last.stat().st_mtime_ns)
        if len(seen) > 4:
            break
        time.sleep(0.1)
    agent.process.send_signal(signal.SIGTERM)
    agent.finish(timeout=30)
    updates = [weights.read(path)["update"] for path in checkpoints.present(config.experiment_dir) if path.name != checkpoints.BEST]
    assert len(seen) > 4
    assert len(updates) == 4
    assert all(newer - older > 1 for newer, older in itertools.pairwise(updates[1:]))  # not twice for one passing of time


def test_torchrun_that_is_told_to_stop_saves_the_run(settings):
    config = settings(exp_name="told", **{**LONG, "epochs": 10000, "save_every": 10**6, "eval_every": 10**6})
    agent = Torchrun(config, "--standalone", "--nproc_per_node", "2")
    wait_for_update(config, 5)
    agent.process.send_signal(signal.SIGTERM)
    agent.finish(timeout=30)
    assert weights.read(config.experiment_dir / "last.pth.tar")["update"] >= 5
    assert not agent.ranks()


OF_EACH = """
import os, sys, train, train_improved
from config import Config
from config_improved import ImprovedConfig
from runtime import run_script
run_script(lambda: train.train(eval(sys.argv[1 + int(os.environ["RANK"])]), train.PixelStep))
"""


def test_processes_that_would_train_differently_refuse(settings):
    config = settings(exp_name="differ")
    with pytest.raises(AssertionError, match="seed is 1 and 0"):
        in_processes(OF_EACH, repr(config), repr(dataclasses.replace(config, seed=1)))
    assert not config.experiment_dir.exists()


def test_a_vgg19_that_is_random_in_one_process_is_refused(place):
    changes = {"model_arch_name": "rcan_cbam_x2", "use_composite_loss": True, "adversarial_weight": 0.0, "lr_patch_size": 16}
    config = small_runs(ImprovedConfig, place)(exp_name="one_random", vgg19_weights_path="random", small_images="skip", **changes)
    code = OF_EACH.replace("train.PixelStep", "train_improved.AdversarialStep")
    with pytest.raises(AssertionError, match="random VGG19 is False and True"):
        in_processes(code, repr(config), repr(dataclasses.replace(config, vgg19_weights_path="a.pth")))


OTHERWISE = """
import os, sys, train
from config import Config
from runtime import run_script
rank, real = int(os.environ["RANK"]), train.Run.restore
def restore(run, *found):
    real(run, *found)
    {change}
train.Run.restore = restore
run_script(lambda: train.train(eval(sys.argv[1]), train.PixelStep))
"""


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ("run.progress.update += rank", r"update is 11 and 10"),
        ("run.step.generator.get_parameter('conv1.bias').data.add_(rank)", r"checksum of the weights is '\w{8}' and '\w{8}'"),
        ("run.ema.network.get_parameter('conv1.bias').data.add_(rank)", r"checksum of the weights is '\w{8}' and '\w{8}'"),
    ],
)
def test_processes_that_start_elsewhere_refuse(settings, tmp_path, change, differing):
    import train

    assert train.train(settings(exp_name="start", results_dir=str(tmp_path), epochs=1), train.PixelStep)
    before = (tmp_path / "start" / "last.pth.tar").read_bytes()
    with pytest.raises(AssertionError, match=differing):
        in_processes(OTHERWISE.format(change=change), repr(settings(exp_name="start", results_dir=str(tmp_path))))
    assert (tmp_path / "start" / "last.pth.tar").read_bytes() == before


def test_machines_with_other_images_refuse(settings, tmp_path):
    config = settings(exp_name="images", results_dir=str(tmp_path / "results"))
    for name, seed, sizes in (("train", 5, [(32, 36), (28, 30)]), ("valid", 9, [(32, 36)])):
        shutil.copytree(config.data_root, tmp_path / name)
        folder = tmp_path / name / name.title()
        shutil.rmtree(folder)
        write_set(folder, sizes, seed=seed)
    for name, differing in (("train", "training images is '"), ("valid", r"valid images is \{'Valid': \['")):
        other = dataclasses.replace(config, data_root=str(tmp_path / name), cache_dir=str(tmp_path / f"cache_{name}"))
        with pytest.raises(AssertionError, match=differing):
            in_processes(OF_EACH, repr(config), repr(other))
    assert not config.experiment_dir.exists()


def test_one_that_waits_for_another_can_be_ended(place):
    code = """
import os, signal, threading, time
from runtime import run_script, start_runtime
runtime = start_runtime()
runtime.wait_for_all()
start = time.monotonic()
if runtime.rank == 0:
    time.sleep(8)
    run_script(lambda: None)  # which leaves the group
else:
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        run_script(lambda: runtime.in_turns(int))
    except SystemExit as end:
        print(end.code, time.monotonic() - start < 5)
"""
    assert [said.strip() for said in in_processes(code)] == ["", "143 True"]


def test_train_and_train_improved_together_are_refused(place):
    other = small_runs(ImprovedConfig, place)(exp_name="both", model_arch_name="rcan_cbam_x2", use_composite_loss=False)
    both = small_runs(Config, place)(exp_name="both")
    with pytest.raises(AssertionError, match="script is 'ImprovedConfig' and 'Config'") as caught:
        in_processes(OF_EACH, repr(both), repr(other))
    assert "Traceback" not in str(caught.value)


def test_machines_with_disks_of_their_own_build_the_store_once_each(settings, tmp_path):
    """Four processes on two machines: the main one, then the first of the other, then all the rest, who find it built."""
    code = """
import os, sys, dataclasses, store, train
from config import Config
from runtime import run_script
rank = int(os.environ["RANK"])
os.environ["LOCAL_RANK"] = str(rank % 2)
config = eval(sys.argv[1])
config = dataclasses.replace(config, cache_dir=f"{config.cache_dir}/machine{rank // 2}")
real = store.make_lr
def make_lr(*arguments):
    print("built", end="")
    return real(*arguments)
store.make_lr = make_lr
run_script(lambda: train.train(config, train.PixelStep))
"""
    config = settings(exp_name="caches", cache_dir=str(tmp_path), results_dir=str(tmp_path / "results"), epochs=1, eval_every=100)
    said = in_processes(code, repr(config), count=4)
    assert [part.count("built") for part in said] == [3, 0, 3, 0]  # images


def test_evaluation_is_spread_and_gives_the_same_table(place):
    code = """
import sys, utils, imgproc
from helpers import drawn_image
from runtime import run_script, start_runtime
runtime = start_runtime()
gts = [drawn_image(40, 44, seed) for seed in range(5)]
images = [(name, imgproc.degrade(gt, 2), gt) for name, gt in zip("cabed", gts)]
seen = []
scores = utils.evaluate(lambda lr: imgproc.imresize(lr, 2), images, 2, runtime, on_image=lambda name, *_: seen.append(name))
print({name: scores[name] for name in ("psnr", "ssim", "images")}, "|", "".join(seen))
run_script(lambda: None)  # which leaves the group
"""
    code = f"import sys; sys.path.append({str(REPOSITORY / 'tests')!r})\n{code}"
    (single,), pair = in_processes(code, count=1), in_processes(code, count=2)
    assert {line.split("|")[0] for line in (single, *pair)} == {single.split("|")[0]}
    assert [line.split("|")[1].strip() for line in (single, *pair)] == ["cabed", "cbd", "ae"]


def test_questions_are_answered_an_update_later_and_alike(place):
    code = """
from runtime import Poll, run_script, start_runtime
runtime = start_runtime()
poll = Poll(runtime)
heard = [poll(update == 1 and runtime.rank == 1, update == 2) for update in range(4)]
print(heard, poll.finish(), poll.finish())
run_script(lambda: None)  # which leaves the group
"""
    expected = "[[False, False], [False, False], [True, False], [False, True]] [False, False] []"
    assert [said.strip() for said in in_processes(code)] == [expected] * 2
    poll = Poll(Runtime(device=None))
    assert (poll(True, False), poll(False, True), poll.finish()) == ([True, False], [False, True], [])
