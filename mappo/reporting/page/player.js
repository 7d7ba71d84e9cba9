"use strict";
// Play recorded episodes on a canvas: decode 16-bit series and draw entities, walls and lidar rays.
// `rollouts` is the JSON that mappo/evaluation/rollouts.py writes.
function makePlayer(root, rollouts) {
  const find = (name) => root.querySelector(`[data-player="${name}"]`);
  const canvas = find("canvas"), context = canvas.getContext("2d");
  const slider = find("frame"), playButton = find("play"), speed = find("speed");
  const label = find("label"), clock = find("clock"), beside = find("beside");
  const decoded = new Map();
  let selectedLabel = label.value, position = 0, isPlaying = false, lastTick = null;

  function decode(series) {
    const text = atob(series.data), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const view = new DataView(bytes.buffer), numbers = new Float64Array(bytes.length / 2);
    for (let i = 0; i < numbers.length; i++) numbers[i] = view.getInt16(2 * i, true) * series.unit;
    return numbers;
  }

  function decodedEpisode(policy) {
    const key = `${policy} ${selectedLabel}`;
    if (!decoded.has(key)) {
      const recorded = rollouts.episodes.find((item) => item.policy === policy && item.label === selectedLabel);
      decoded.set(key, recorded && {
        ...recorded,
        poses: decode(recorded.poses),
        numPoses: recorded.poses.shape[0],
        lidars: recorded.lidars.map((lidar) => ({ ...lidar, distances: decode(lidar.distances) })),
      });
    }
    return decoded.get(key);
  }

  function panels() {
    return ["trained", beside.value].map(decodedEpisode).filter(Boolean);
  }

  const frameAt = (episode, frame) => Math.min(Math.floor(frame / episode.stride), episode.numPoses - 1);
  const lastFrame = () => Math.max(...panels().map((episode) => episode.num_frames));

  function latest(changes, index) {
    let value = changes[0][1];
    for (const [from, next] of changes) { if (from > index) break; value = next; }
    return value;
  }

  // Half the width and height of the drawn area in metres. It covers every position of the agents, and at least the
  // view of the scenario's camera.
  function extent(episode) {
    if (!episode.extent) {
      const { zoom, origin, aspect_ratio: aspect } = rollouts.view;
      let half = [zoom * Math.max(aspect, 1), zoom / Math.min(aspect, 1)];
      const count = episode.entities.length;
      episode.entities.forEach((entity, index) => {
        if (entity.kind !== "agent") return;
        const margin = 2 * Math.max(...entity.size);
        for (let i = 0; i < episode.numPoses; i++) {
          const offset = 3 * (i * count + index);
          half = half.map((size, axis) => Math.max(size, Math.abs(episode.poses[offset + axis] - origin[axis]) + margin));
        }
      });
      episode.extent = half;
    }
    return episode.extent;
  }

  function drawWalls() {
    const [x, y] = rollouts.view.semidims;
    const reach = 1e3;
    context.strokeStyle = "#888888";
    if (x !== null) for (const side of [-x, x]) line(side, y === null ? -reach : -y, side, y === null ? reach : y);
    if (y !== null) for (const side of [-y, y]) line(x === null ? -reach : -x, side, x === null ? reach : x, side);
  }

  function line(fromX, fromY, toX, toY) {
    context.beginPath(); context.moveTo(fromX, fromY); context.lineTo(toX, toY); context.stroke();
  }

  function drawEntity(entity, x, y, rotation, index, pixel) {
    if (!latest(entity.visible, index)) return;
    const [red, green, blue, alpha] = latest(entity.colours, index);
    const colour = `rgba(${255 * red}, ${255 * green}, ${255 * blue}, ${alpha})`;
    context.save();
    context.translate(x, y); context.rotate(rotation);
    context.fillStyle = colour; context.strokeStyle = colour; context.lineWidth = 1.5 * pixel;
    context.beginPath();
    if (entity.shape === "box") context.rect(-entity.size[0] / 2, -entity.size[1] / 2, ...entity.size);
    else if (entity.shape === "line") { context.moveTo(-entity.size[0] / 2, 0); context.lineTo(entity.size[0] / 2, 0); }
    else context.arc(0, 0, Math.max(entity.size[0], pixel), 0, 2 * Math.PI);
    if (entity.shape === "line") { context.lineWidth = Math.max(entity.size[1] || 0, 2 * pixel); context.stroke(); }
    else if (entity.is_hollow) context.stroke();
    else context.fill();
    if (entity.kind === "agent") {
      context.strokeStyle = "rgba(0, 0, 0, 0.65)"; context.lineWidth = pixel;
      if (entity.shape !== "line") context.stroke();
      line(0, 0, Math.max(...entity.size) * (entity.shape === "sphere" ? 1 : 0.5), 0);
    }
    context.restore();
  }

  function drawLidar(lidar, episode, index, pixel) {
    const count = episode.entities.length, rays = lidar.angles.length;
    const offset = 3 * (index * count + lidar.entity), [x, y, rotation] = episode.poses.subarray(offset, offset + 3);
    context.strokeStyle = "rgba(128, 128, 128, 0.45)"; context.lineWidth = pixel;
    lidar.angles.forEach((angle, ray) => {
      const distance = lidar.distances[index * rays + ray], direction = angle + rotation;
      const toX = x + distance * Math.cos(direction), toY = y + distance * Math.sin(direction);
      line(x, y, toX, toY);
      if (distance < lidar.max_range - 1e-3) {
        context.fillStyle = "#e11d48"; context.beginPath(); context.arc(toX, toY, 2 * pixel, 0, 7); context.fill();
      }
    });
  }

  function drawPanel(episode, left, top, width, height) {
    const [halfX, halfY] = [0, 1].map((axis) => Math.max(...panels().map((other) => extent(other)[axis])));
    const scale = Math.min(width / (2 * halfX), height / (2 * halfY));
    const pixel = 1 / scale, index = frameAt(episode, Math.floor(position)), count = episode.entities.length;
    const [originX, originY] = rollouts.view.origin;
    context.save();
    context.beginPath(); context.rect(left, top, width, height); context.clip();
    context.translate(left + width / 2, top + height / 2);
    context.scale(scale, -scale); context.translate(-originX, -originY);
    context.lineWidth = pixel;
    drawWalls();
    episode.lidars.forEach((lidar) => drawLidar(lidar, episode, index, pixel));
    const order = episode.entities.map((_, i) => i).sort((a, b) =>
      (episode.entities[a].kind === "agent") - (episode.entities[b].kind === "agent"));
    for (const i of order) drawEntity(episode.entities[i], ...episode.poses.subarray(3 * (index * count + i), 3 * (index * count + i) + 3), index, pixel);
    context.restore();
    const reward = episode.rewards.slice(0, Math.floor(position)).reduce((sum, value) => sum + value, 0);
    context.fillStyle = getComputedStyle(canvas).color;
    context.font = `${14 * ratio()}px sans-serif`;
    const suffix = Math.floor(position) >= episode.num_frames ? ", ended" : "";
    context.fillText(`${episode.policy}: return ${reward.toFixed(2)} of ${episode.episode_return.toFixed(2)}${suffix}`, left + 8 * ratio(), top + 20 * ratio());
  }

  const ratio = () => window.devicePixelRatio || 1;

  function draw() {
    const all = panels(), isWide = canvas.clientWidth > 640;
    const across = isWide ? all.length : 1, down = all.length / across;
    const fitting = (canvas.clientWidth / across) * Math.min(1, 1 / rollouts.view.aspect_ratio) * down;
    canvas.style.height = `${Math.round(isWide ? Math.min(fitting, 440) : fitting)}px`;
    canvas.width = canvas.clientWidth * ratio(); canvas.height = canvas.clientHeight * ratio();
    context.clearRect(0, 0, canvas.width, canvas.height);
    const width = canvas.width / across, height = canvas.height / down;
    all.forEach((episode, i) => drawPanel(episode, (i % across) * width, Math.floor(i / across) * height, width, height));
    if (across > 1) { context.strokeStyle = "#8888"; context.lineWidth = 1; line(width, 0, width, canvas.height); }
    slider.max = lastFrame(); slider.value = Math.floor(position);
    const seconds = Math.floor(position) * rollouts.seconds_per_frame;
    clock.textContent = `frame ${Math.floor(position)} of ${lastFrame()}, ${seconds.toFixed(1)} s simulated`;
    canvas.dataset.frame = Math.floor(position);
  }

  function tick(time) {
    if (!isPlaying) return;
    if (lastTick !== null) position += ((time - lastTick) / 1000) * Number(speed.value) / rollouts.seconds_per_frame;
    lastTick = time;
    if (position >= lastFrame()) { position = lastFrame(); setPlaying(false); }
    draw();
    requestAnimationFrame(tick);
  }

  function setPlaying(value) {
    if (value && position >= lastFrame()) position = 0;
    isPlaying = value; lastTick = null;
    playButton.textContent = value ? "Pause" : "Play";
    if (value) requestAnimationFrame(tick);
  }

  playButton.addEventListener("click", () => setPlaying(!isPlaying));
  slider.addEventListener("input", () => { setPlaying(false); position = Number(slider.value); draw(); });
  beside.addEventListener("change", draw);
  label.addEventListener("change", () => { selectedLabel = label.value; position = 0; draw(); });
  new ResizeObserver(draw).observe(root);
  draw();
  return { play: () => setPlaying(true), seek: (frame) => { position = frame; draw(); } };
}
