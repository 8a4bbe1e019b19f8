"""A server over the tiny checkpoint, one for every file of tests that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.model.checkpoint import Bundle
from tests.app.serving import Running, running


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> NextFlowPipeline:
    return NextFlowPipeline(bundle)


@pytest.fixture(scope="module")
def server(pipeline: NextFlowPipeline) -> Iterator[Running]:
    with running(pipeline) as up:
        yield up
