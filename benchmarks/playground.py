"""Episodes per second of every playground task on one core, built and rendered, by CPU time.

    python benchmarks/playground.py [--count 150] [--level wide] [--size 64x64] [--split train]

Exit status 1 when a task with one picture makes fewer than 300 a second.
"""

import argparse
import sys
import time

from nextflow_ar.data.playground.curriculum import TASK_NAMES, episode

FLOOR = 300


def measure(task, count, split, canvas, level):
    """(episodes per second, pictures per episode); patches that repeat are cached, as in training."""
    for index in range(count):
        for shown in episode(task, index, 1, split, canvas, level).pictures:
            shown.render()
    began, pictures = time.process_time(), 0
    for index in range(count):
        found = episode(task, index, 2, split, canvas, level)
        for shown in found.pictures:
            shown.render()
        pictures += len(found.pictures)
    return count / (time.process_time() - began), pictures / count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--level", default="world")
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--split", default="train")
    given = parser.parse_args()
    width, height = (int(side) for side in given.size.split("x"))
    slow = []
    print(f"{'task':<22}{'episodes/s':>12}{'pictures':>10}")
    for task in TASK_NAMES:
        rate, pictures = measure(task, given.count, given.split, (height, width), given.level)
        slow += [task] if pictures == 1 and rate < FLOOR else []
        print(f"{task:<22}{rate:>12.0f}{pictures:>10.1f}")
    if slow:
        sys.exit(f"fewer than {FLOOR} episodes a second: {', '.join(slow)}")


if __name__ == "__main__":
    main()
