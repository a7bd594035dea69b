"""Agents for tests: functions, which ask nobody, and programs."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time

import numpy as np


async def run(data, base_url, api_key, start, **columns):
    await asyncio.sleep(0)
    return {"reward": start, "columns": len(columns), "whole": len(data), "asked": len(base_url) + len(api_key)}


def plain(base_url, api_key, seed, start, bonus=0.0):
    return np.float32(start + bonus)


def seeded(base_url, api_key, seed):
    return {"reward": 0, "seed": seed, "drawn": random.random()}


async def of_kind(data, base_url, api_key):
    await asyncio.sleep(0)
    kinds = {
        "none": None,
        "text": "good",
        "nan": float("nan"),
        "list": [1.0],
        "no reward": {"score": 1},
        "no reward yet": {"reward": None, "score": 1},
        "metric": {"reward": 1, "score": "high"},
        "metric name": {"reward": 1, 3: 4},
        "infinite": {"reward": 1, "score": float("inf")},
        "true": True,
    }
    return kinds[data["kind"]]


async def raises(data, base_url, api_key):
    await asyncio.sleep(0)
    raise ValueError("no luck")


def misread(data, base_url, api_key):
    return json.loads("{")  # in misread


async def misread_later(data, base_url, api_key):
    await asyncio.sleep(0)
    return json.loads("{")  # in misread_later


def generator(data, base_url, api_key):
    yield 1.0


async def generator_later(data, base_url, api_key):
    yield 1.0


def leaves(data, base_url, api_key):
    sys.exit("enough")


async def leaves_later(data, base_url, api_key):
    await asyncio.sleep(0)
    sys.exit("enough")


def dies(data, base_url, api_key):
    os._exit(7)


async def sleeps(data, base_url, api_key, seconds=60.0):
    await asyncio.sleep(seconds)


def blocks(data, base_url, api_key):
    while True:
        time.sleep(0.01)


def secretive(data, base_url, api_key):
    return float(len(os.environ["MY_SECRET"]))


def proxied(data, base_url, api_key):
    return {
        "reward": 0,
        "past": "127.0.0.1" in os.environ["NO_PROXY"].split(","),
        "kept": "there" in os.environ["no_proxy"],
    }


def without_url(data, api_key):
    return 0.0


def starts(data, base_url, api_key):
    subprocess.Popen(["sleep", "60"])
    time.sleep(60)
