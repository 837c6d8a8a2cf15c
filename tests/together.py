"""What each of two processes does in test_several_processes.py: python together.py FOLDER."""

import sys
from pathlib import Path

import torch
import untrained

from improved_diffusion import dist_util, logger
from improved_diffusion.resample import LossSecondMomentResampler
from improved_diffusion.script_util import create_model_and_diffusion
from improved_diffusion.train_util import TrainLoop

IMAGES, STEPS, TIMESTEPS = 8, 4, 20
UNEVEN = ([0, 3], [3, 8])  # which of a batch's images each process has
FLAGS = {
    **untrained.FLAGS,
    "diffusion_steps": TIMESTEPS,
    "class_cond": True,
    "num_classes": 3,
    "use_checkpoint": True,
    "self_condition": True,
}


def batches(begin, end):
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        images = torch.rand(IMAGES, 2, 16, 16, generator=generator) * 2 - 1
        labels = torch.randint(3, (IMAGES,), generator=generator)
        yield images[begin:end], {"y": labels[begin:end]}


def train(folder, begin, end, microbatch):
    """The gradient of the first step, the timesteps' losses after the last, and the loop."""
    logger.configure(str(folder), ["csv"] if dist_util.rank() == 0 else [])
    torch.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**FLAGS)
    for parameter in model.parameters():  # zero layers would hide what lies before them
        torch.nn.init.normal_(parameter, std=0.05)
    sampler = LossSecondMomentResampler(diffusion, history_per_term=1)
    sampler.update_with_all_losses(range(TIMESTEPS), torch.linspace(0.1, 5, TIMESTEPS).tolist())
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=batches(begin, end),
        batch_size=end - begin,
        microbatch=microbatch,
        lr=1e-4,
        ema_rate=0.9,
        log_interval=2,
        save_interval=0,
        resume_checkpoint="",
        schedule_sampler=sampler,
        channels=["Seg", "T1CE"],
        classes=["a", "b", "c"],
        precision="fp32",
    )
    gradients = []
    step = loop.run_step

    def noted(*batch):
        step(*batch)
        if not gradients:
            gradients.append(torch.cat([p.grad.flatten() for p in loop.params]))

    loop.run_step = noted
    loop.run_loop()
    return {
        "gradient": gradients[0],
        "weights": torch.cat([p.detach().flatten() for p in loop.params]),
        "history": sampler.state_dict(),
        "samples": loop.samples,
    }


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with dist_util.one_of_several():
        dist_util.setup_dist(several=True)
        rank = dist_util.rank()
        outcome = train(folder / "together", *UNEVEN[rank], microbatch=2)
        outcome["numbers"] = dist_util.gather(rank, 10 + rank)
        rows = torch.full((rank + 1, 2), float(rank))
        outcome["rows"] = dist_util.gather_rows(rows)
        outcome["first"] = dist_util.on_first(lambda: f"from {rank}")
        torch.save(outcome, folder / f"{rank}.pt")


if __name__ == "__main__":
    main()
