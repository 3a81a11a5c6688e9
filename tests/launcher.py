"Programs in several processes of `accelerate launch`, connected by gloo on the CPU."

import sys


def launch_command(processes: int) -> list[str]:
    """The command before the program's path.

    --multi_gpu is accelerate's name for torchrun; --cpu would ask for MPI. Without a GPU the
    program's `PartialState(cpu=True)`, or tocsr, connects the processes by gloo.
    """
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
