"""Settings of our servers: JUPYTER_CONFIG_PATH leads `make lab` and the browser tests here; Binder copies it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection


class PromptKernelConnection(ZMQChannelsWebsocketConnection):
    """A kernel's websocket that sends each message at once.

    Without TCP_NODELAY the small messages that follow each other wait for the browser's delayed acknowledgement: up to
    40 ms between a slider's move and the redrawn chart.
    """

    def connect(self) -> Any:
        """Subscribe to the kernel, with Nagle's algorithm off on the browser's side."""
        self.websocket_handler.set_nodelay(True)  # type: ignore[attr-defined]
        return super().connect()


c = get_config()  # type: ignore[name-defined]  # noqa: F821 - traitlets puts it there
c.ServerApp.kernel_websocket_connection_class = PromptKernelConnection
# Runs workbench.ipynb when it is opened, see there.
c.LabServerApp.extra_labextensions_path = [str(Path(__file__).parent / "labextensions")]
# No pop-ups over the workbench, and no request for them.
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
