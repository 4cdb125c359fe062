"""One grid, one store, one report: what is compared, what came out, and the pages that show it."""

from sparing.study.cells import Cell, cells_of
from sparing.study.methods.known import known_methods
from sparing.study.methods.method import Method, Prepared
from sparing.study.pages.profile_page import render, write_report
from sparing.study.spec import StudySpec, read_study
from sparing.study.store import Result, Store, Stored
from sparing.study.study import Study
from sparing.study.trainings.known import known_trainings
from sparing.study.trainings.training import Training

__all__ = [
    "Cell",
    "Method",
    "Prepared",
    "Result",
    "Store",
    "Stored",
    "Study",
    "StudySpec",
    "Training",
    "cells_of",
    "known_methods",
    "known_trainings",
    "read_study",
    "render",
    "write_report",
]
