// JupyterLab runs no notebook by itself. On the servers that are ours (`make lab`, Binder) the workbench is to show
// without a key press: this runs workbench.ipynb once when it is opened, and nothing else. Written in the form in which
// JupyterLab loads built extensions, so that nothing has to be built.
(() => {
  const asksForIt = (panel) =>
    panel?.context?.path?.split("/").pop() === "workbench.ipynb" &&
    panel.content?.model?.getMetadata("workbench")?.run_on_open === true;

  const plugin = {
    id: "workbench-open:plugin",
    autoStart: true,
    activate: (app) => {
      const seen = new WeakSet();
      const look = async () => {
        const panel = app.shell.currentWidget;
        if (!panel?.context || seen.has(panel)) return;
        seen.add(panel);
        await panel.context.ready;
        if (!asksForIt(panel)) return;
        await panel.sessionContext?.ready;
        const kernel = panel.sessionContext?.session?.kernel;
        if (!kernel) return; // the person chose none
        await kernel.info;
        const cells = [...panel.content.model.cells];
        // A page that is reloaded finds its kernel, and the workbench in it, as it left them.
        if (cells.some((cell) => cell.executionCount)) return;
        await app.commands.execute("notebook:run-all-cells");
      };
      app.shell.currentChanged?.connect(look);
      app.restored.then(look);
    },
  };

  window._JUPYTERLAB = window._JUPYTERLAB || {};
  window._JUPYTERLAB["workbench-open"] = {
    init: () => undefined,
    get: (name) =>
      name === "./extension"
        ? Promise.resolve(() => ({ __esModule: true, default: plugin }))
        : Promise.reject(new Error(`workbench-open has no ${name}`)),
  };
})();
