"""Runs of several steps: what is asked of a model, done step by step into a run that can be resumed."""

from workbench.studies.atlas import atlas as atlas
from workbench.studies.atlas import atlas_settings as atlas_settings
from workbench.studies.spec import Study as Study
from workbench.studies.spec import read_study as read_study
from workbench.studies.study import run_study as run_study
from workbench.studies.survey import Reporter as Reporter
from workbench.studies.survey import SurveySettings as SurveySettings
from workbench.studies.survey import survey as survey
