"use strict";
// Draw the plots in the colours of the reader's light or dark scheme, and start the players.
(function () {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const plots = read("plots");

  function layout(plotLayout) {
    const ink = dark.matches ? "#d4d4d8" : "#27272a", grid = dark.matches ? "#3f3f46" : "#e4e4e7";
    const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true };
    const axes = Object.keys(plotLayout).filter((name) => /^[xy]axis/.test(name)).concat("xaxis", "yaxis");
    return {
      ...plotLayout,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, family: "system-ui, sans-serif", size: 12 },
      margin: { l: 56, r: 12, t: 36, b: 44 }, height: 300,
      ...Object.fromEntries(axes.map((name) => [name, { ...plotLayout[name], ...axis }])),
      legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0 }, hovermode: "closest",
    };
  }

  function drawPlots() {
    for (const plot of plots) {
      const element = document.getElementById(`plot-${plot.identifier}`);
      Plotly.react(element, plot.figure.data, layout(plot.figure.layout), { responsive: true, displaylogo: false, displayModeBar: false });
    }
    document.body.dataset.plots = plots.length;
  }

  drawPlots();
  dark.addEventListener("change", drawPlots);
  for (const root of document.querySelectorAll("[data-rollouts]")) {
    root.player = makePlayer(root, read(root.dataset.rollouts));
  }
})();
