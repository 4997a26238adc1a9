"""What a run switches for the whole process."""

import ctypes
import gc
import os
import subprocess
import sys

import pytest
from helpers.data import REPOSITORY

from embedding_finetune import process


class MallocInfo(ctypes.Structure):
    """mallinfo2 of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def blocks_mapped_for(size):
    """How many blocks the kernel maps for one of this size: 0 where malloc has kept one."""
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    libc.mallinfo2.restype = MallocInfo
    before = libc.mallinfo2().hblks
    block = libc.malloc(size)
    mapped = libc.mallinfo2().hblks - before
    libc.free(block)
    return mapped


def test_what_was_imported_is_left_out_by_the_garbage_collector_during_a_run():
    before = gc.get_freeze_count()
    with process.as_a_run():
        with process.importing():
            pass
        assert gc.get_freeze_count() > before + 10_000
    assert gc.get_freeze_count() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_malloc_reuses_large_blocks_during_a_run_and_maps_them_after_it():
    with process.as_a_run():
        with process.importing():
            pass
        assert blocks_mapped_for(2**28) == 0
    assert blocks_mapped_for(2**29) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_freed_memory_stays_in_the_process_until_it_is_given_back():
    program = """
from embedding_finetune import process

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

with process.as_a_run():
    with process.importing():
        pass
    blocks = [bytearray(2**20) for _ in range(200)]
    held = resident()
    kept = blocks.pop()  # above the freed ones, so that they are not at the heap's end
    del blocks
    freed = resident()
    process.give_back_free_memory()
    print(held - freed < 2**20, freed - resident() > 150 * 2**20)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert result.stdout.split() == ["True", "True"]


def test_what_a_library_imports_of_the_package_switches_nothing():
    program = """
import gc, os, signal
import transformers, datasets
bars = transformers.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
before = dict(os.environ)
import embedding_finetune.training.setup, embedding_finetune.retrieval.encoder, embedding_finetune.process
assert bars == (transformers.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled())
assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
assert gc.isenabled()
assert {**os.environ, **before} == dict(os.environ)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_several_copies_of_openmp_are_let_be_on_macos_unless_the_user_says_otherwise(monkeypatch):
    name = "KMP_DUPLICATE_LIB_OK"
    monkeypatch.delenv(name, raising=False)
    for platform, value in (("linux", None), ("darwin", "TRUE")):
        monkeypatch.setattr(sys, "platform", platform)
        with process.as_a_run():
            with process.importing():
                assert os.environ.get(name) == value
            assert os.environ.get(name) == value
        assert name not in os.environ
    monkeypatch.setenv(name, "FALSE")
    with process.as_a_run(), process.importing():
        assert os.environ[name] == "FALSE"
    assert os.environ[name] == "FALSE"


def test_what_ends_a_run_early_is_known_until_the_next_one():
    with pytest.raises(ZeroDivisionError), process.as_a_run():
        raise ZeroDivisionError
    assert process.failures == [ZeroDivisionError]
    with process.as_a_run():
        pass
    assert process.failures == []
