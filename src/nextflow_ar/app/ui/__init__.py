"""The web page (gradio; extra ``ui``)."""

from nextflow_ar.app.ui.page import build_page, launch_options, mount_page

__all__ = ["build_page", "launch_options", "mount_page"]
