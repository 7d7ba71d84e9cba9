"use strict";
// Draw the plots in the colours of the reader's light or dark scheme, and start the players.
(function () {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const plots = read("plots");
  // Values from the lowest to the highest: in both schemes, the highest stand out most.
  const scales = { light: [[0, "#cbd5e1"], [0.5, "#60a5fa"], [1, "#1e3a8a"]], dark: [[0, "#52525b"], [0.5, "#3b82f6"], [1, "#fde047"]] };

  function colours() {
    return dark.matches
      ? { ink: "#d4d4d8", grid: "#3f3f46", card: "#27272a", scale: scales.dark }
      : { ink: "#27272a", grid: "#e4e4e7", card: "#fafafa", scale: scales.light };
  }

  // Return the colour of a share of the highest value, between two colours of the scale.
  function colourOf(scale, share) {
    const next = Math.max(1, scale.findIndex(([position]) => position >= share));
    const [[low, from], [high, to]] = [scale[next - 1], scale[next]], weight = (share - low) / (high - low);
    const mix = [1, 3, 5].map((i) => parseInt(from.slice(i, i + 2), 16) * (1 - weight) + parseInt(to.slice(i, i + 2), 16) * weight);
    return `rgb(${mix.map(Math.round).join(", ")})`;
  }

  // Set the colours of a trace that mappo marks: `ink` for marks that must contrast, `scale` and `share` for values.
  function themed(trace, { ink, scale }) {
    if (trace.meta === "ink") return { ...trace, marker: { ...trace.marker, color: ink }, error_x: { ...trace.error_x, color: ink } };
    if (trace.meta === "scale") return { ...trace, marker: { ...trace.marker, colorscale: scale } };
    if (trace.meta && "share" in trace.meta) return { ...trace, line: { ...trace.line, color: colourOf(scale, trace.meta.share) } };
    return trace;
  }

  function layout(plot, element, { ink, grid, card }) {
    const { layout: given, data } = plot.figure;
    const isNarrow = element.clientWidth < 480, isMain = element.parentElement.classList.contains("main");
    const hasLegend = data.filter((trace) => trace.showlegend !== false).length > 1;
    const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true, nticks: isNarrow ? 4 : undefined };
    const axes = Object.keys(given).filter((name) => /^[xy]axis/.test(name)).concat("xaxis", "yaxis");
    return {
      ...given,
      paper_bgcolor: card, plot_bgcolor: card,
      font: { color: ink, family: "system-ui, sans-serif", size: 12 },
      margin: { l: 44, r: 12, t: hasLegend ? 28 : 8, b: 40, ...given.margin },
      height: given.height || (isMain ? 260 : 220),
      ...Object.fromEntries(axes.map((name) => [name, { ...axis, ...given[name] }])),
      showlegend: hasLegend,
      legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0 }, hovermode: "closest",
    };
  }

  function drawPlots() {
    const scheme = colours();
    for (const plot of plots) {
      const element = document.getElementById(`plot-${plot.identifier}`);
      const traces = plot.figure.data.map((trace) => themed(trace, scheme));
      Plotly.react(element, traces, layout(plot, element, scheme), { responsive: true, displaylogo: false, displayModeBar: false });
    }
    document.body.dataset.plots = plots.length;
  }

  drawPlots();
  dark.addEventListener("change", drawPlots);
  for (const root of document.querySelectorAll("[data-rollouts]")) {
    root.player = makePlayer(root, read(root.dataset.rollouts));
  }
})();
