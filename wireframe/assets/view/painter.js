// Draws one scene with WebGL 2: points by class, wires as wide lines, cameras, the ground. Colours have straight alpha.

const POINT_VERTEX = `#version 300 es
uniform mat4 uLens; uniform vec3 uSizes; uniform vec2 uFog; uniform float uBias;
in vec3 aAt;
out float vFade, vSize;
void main() {
  gl_Position = uLens * vec4(aAt, 1.0);
  float depth = gl_Position.w;
  vSize = clamp(uSizes.x / max(depth, 1e-6), uSizes.y, uSizes.z);
  vFade = 1.0 - 0.62 * smoothstep(uFog.x, uFog.y, depth);
  gl_PointSize = vSize;
  gl_Position.z -= uBias * depth;
}`;

const POINT_FRAGMENT = `#version 300 es
precision highp float;
uniform vec4 uColor; uniform float uRing;
in float vFade, vSize;
out vec4 color;
void main() {
  float r = length(gl_PointCoord * 2.0 - 1.0), soft = 2.0 / vSize;
  float alpha = 1.0 - smoothstep(1.0 - soft, 1.0, r);
  alpha *= uRing > 0.0 ? smoothstep(uRing - soft, uRing, r) : 1.0;
  if (alpha < 0.05) discard;
  alpha *= uColor.a * vFade;
  color = vec4(uColor.rgb * (1.0 - 0.16 * r * r) * alpha, alpha);
}`;

// Each line is a rectangle around it on the screen; what is behind the eye is cut off before the division.
const LINE_VERTEX = `#version 300 es
uniform mat4 uLens; uniform vec2 uScreen, uFog; uniform float uWidth, uBias, uNear, uRim;
in vec2 aCorner; in vec3 aFrom, aTo;
out vec2 vAt; out float vLength, vFade;
void main() {
  vec4 a = uLens * vec4(aFrom, 1.0), b = uLens * vec4(aTo, 1.0);
  vAt = vec2(0.0); vLength = 0.0; vFade = 0.0;
  if (a.w < uNear && b.w < uNear) { gl_Position = vec4(2.0, 2.0, 2.0, 1.0); return; }
  if (a.w < uNear) a = mix(a, b, (uNear - a.w) / (b.w - a.w));
  else if (b.w < uNear) b = mix(b, a, (uNear - b.w) / (a.w - b.w));
  vec2 p = a.xy / a.w * uScreen * 0.5, q = b.xy / b.w * uScreen * 0.5;
  vLength = distance(p, q);
  vec2 along = vLength > 1e-4 ? (q - p) / vLength : vec2(1.0, 0.0);
  float reach = uWidth * 0.5 + 1.0;
  vec4 end = aCorner.x < 0.5 ? a : b;
  vec2 at = (aCorner.x < 0.5 ? p - along * reach : q + along * reach) + vec2(-along.y, along.x) * reach * aCorner.y;
  vAt = vec2(aCorner.x < 0.5 ? -reach : vLength + reach, reach * aCorner.y);
  vFade = 1.0 - 0.5 * smoothstep(uFog.x, uFog.y, end.w);
  // The ground fades away around the building, which is at the origin.
  if (uRim > 0.0) vFade *= 1.0 - smoothstep(0.2, 1.0, length((aCorner.x < 0.5 ? aFrom : aTo).xz) / uRim);
  // Already divided: what is handed on then changes evenly over the screen.
  gl_Position = vec4(at / (uScreen * 0.5), end.z / end.w - uBias, 1.0);
}`;

const LINE_FRAGMENT = `#version 300 es
precision highp float;
uniform vec4 uColor; uniform float uWidth, uDash;
in vec2 vAt; in float vLength, vFade;
out vec4 color;
void main() {
  float beyond = vAt.x - clamp(vAt.x, 0.0, vLength);
  if (uDash > 0.0) {
    float centre = (floor(vAt.x / uDash) + 0.5) * uDash;
    beyond = max(abs(beyond), max(abs(vAt.x - centre) - 0.27 * uDash, 0.0));
  }
  float outside = length(vec2(beyond, vAt.y)) - 0.5 * uWidth;
  float alpha = uColor.a * vFade * (1.0 - smoothstep(-0.7, 0.7, outside));
  if (alpha < 0.004) discard;
  color = vec4(uColor.rgb * alpha, alpha);
}`;

// Corners large, edges smaller, surfaces small, in the order of the classes; radii in metres.
const RADII = [0.13, 0.13, 0.13, 0.07, 0.07, 0.07, 0.07, 0.07, 0.07, 0.07, 0.045, 0.045, 0.04];

// Pixels across a point of a class at a depth; small buildings and large ones get points that fill the picture alike.
function pointSize(kind, radius, pixels, depth, ratio) {
  const { world, least, most } = pointSizes(kind, radius, pixels, ratio);
  return Math.min(Math.max(world / depth, least), most);
}

function pointSizes(kind, radius, pixels, ratio) {
  return { world: 2 * RADII[kind] * (radius / 9) * pixels, least: (1.5 + 11 * RADII[kind]) * ratio, most: 14 * ratio };
}

// Between these depths what is drawn fades.
function fogOf(distance, near, radius) {
  return [Math.max(distance - 0.64 * radius, near), distance + 1.6 * radius];
}

const smooth = (value) => {
  const x = Math.min(Math.max(value, 0), 1);
  return x * x * (3 - 2 * x);
};

function makePainter(canvas) {
  const options = { alpha: true, antialias: false, powerPreference: "high-performance" };
  const gl = canvas.getContext("webgl2", options);
  if (!gl) return null;
  let programs, corner, loaded = null;
  start();

  function start() {
    programs = {
      point: program(POINT_VERTEX, POINT_FRAGMENT),
      line: program(LINE_VERTEX, LINE_FRAGMENT),
    };
    corner = buffer(new Float32Array([0, -1, 0, 1, 1, -1, 1, 1]));
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    loaded = null;
  }

  function program(vertex, fragment) {
    const made = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(made, shader);
    }
    ["aCorner", "aFrom", "aTo"].forEach((name, i) => gl.bindAttribLocation(made, i, name));
    gl.linkProgram(made);
    if (!gl.getProgramParameter(made, gl.LINK_STATUS) && !gl.isContextLost()) {
      throw new Error(`shader: ${gl.getProgramInfoLog(made)}`);
    }
    const at = {};
    for (let i = 0; i < gl.getProgramParameter(made, gl.ACTIVE_UNIFORMS); i++) {
      const { name } = gl.getActiveUniform(made, i);
      at[name] = gl.getUniformLocation(made, name);
    }
    return { made, at };
  }

  function buffer(values) {
    const made = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, made);
    gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
    return { made, count: values.length };
  }

  function pointSet(values) {
    const array = gl.createVertexArray();
    gl.bindVertexArray(array);
    const data = buffer(values);
    const at = gl.getAttribLocation(programs.point.made, "aAt");
    gl.enableVertexAttribArray(at);
    gl.vertexAttribPointer(at, 3, gl.FLOAT, false, 0, 0);
    return { array, data, count: values.length / 3 };
  }

  function lineSet(values) {
    const array = gl.createVertexArray();
    gl.bindVertexArray(array);
    gl.bindBuffer(gl.ARRAY_BUFFER, corner.made);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 2, gl.FLOAT, false, 0, 0);
    const data = buffer(values);
    for (const [at, offset] of [[1, 0], [2, 12]]) {
      gl.enableVertexAttribArray(at);
      gl.vertexAttribPointer(at, 3, gl.FLOAT, false, 24, offset);
      gl.vertexAttribDivisor(at, 1);
    }
    return { array, data, count: values.length / 6 };
  }

  // scene: points Float32Array sorted by class and counts [13]; dots and lines: Float32Arrays by name.
  function load(scene) {
    if (loaded) {
      for (const set of [loaded.points, ...Object.values(loaded.dots), ...Object.values(loaded.lines)]) {
        gl.deleteVertexArray(set.array);
        gl.deleteBuffer(set.data.made);
      }
    }
    const all = (sets, make) => Object.fromEntries(Object.entries(sets).map(([name, values]) => [name, make(values)]));
    loaded = {
      points: pointSet(scene.points), counts: scene.counts, radius: scene.radius,
      dots: all(scene.dots, pointSet), lines: all(scene.lines, lineSet),
    };
  }

  function use({ made, at }, values) {
    gl.useProgram(made);
    for (const [name, value] of Object.entries(values)) {
      if (at[name] === undefined) continue;
      if (typeof value === "number") gl.uniform1f(at[name], value);
      else if (value.length === 16) gl.uniformMatrix4fv(at[name], false, value);
      else gl[`uniform${value.length}fv`](at[name], value);
    }
  }

  // shown: names of layers; classes: which of the points; styles: by name {color [4], width, dash, size, ring}.
  // sharpness: pixels of the picture against those of the screen, along a side.
  function draw(lens, shown, classes, colors, styles, sharpness = 1) {
    const ratio = Math.min(devicePixelRatio || 1, 2) * sharpness;
    const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    gl.viewport(0, 0, width, height);
    gl.depthMask(true);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    if (!loaded) return;
    const { matrix, near, distance, pixels } = lens(width, height);
    const fog = fogOf(distance, near, loaded.radius);
    const common = { uLens: matrix, uScreen: [width, height], uNear: near, uFog: fog };
    gl.disable(gl.DEPTH_TEST);
    if (shown.has("ground")) {
      for (const name of ["fine", "coarse"]) ground(common, loaded.lines[name], colors[name], ratio);
    }
    gl.enable(gl.DEPTH_TEST);
    gl.depthFunc(gl.LEQUAL);
    if (shown.has("points")) points(common, classes, colors.classes, pixels, ratio);
    gl.depthMask(false);
    for (const [name, style] of Object.entries(styles)) {
      if (!shown.has(style.layer)) continue;
      wires({ ...common, uBias: style.bias }, loaded.lines[name], loaded.dots[name], style, ratio);
    }
    gl.bindVertexArray(null);
  }

  function ground(common, lines, color, ratio) {
    gl.bindVertexArray(lines.array);
    const style = { uColor: color, uWidth: 0.9 * ratio, uDash: 0, uBias: 0, uRim: loaded.radius * RIM };
    use(programs.line, { ...common, ...style });
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, lines.count);
  }

  function points(common, classes, colors, pixels, ratio) {
    gl.bindVertexArray(loaded.points.array);
    let first = 0;
    loaded.counts.forEach((count, i) => {
      if (count && classes[i]) {
        const { world, least, most } = pointSizes(i, loaded.radius, pixels, ratio);
        use(programs.point, { ...common, uSizes: [world, least, most], uColor: colors[i], uRing: 0, uBias: 0 });
        gl.drawArrays(gl.POINTS, first, count);
      }
      first += count;
    });
  }

  function wires(common, lines, dots, style, ratio) {
    // What points hide shines through faintly.
    for (const [rule, share] of [[gl.GREATER, 0.45], [gl.LEQUAL, 1]]) {
      gl.depthFunc(rule);
      const color = [...style.color.slice(0, 3), style.color[3] * share];
      if (lines && lines.count) {
        gl.bindVertexArray(lines.array);
        const dash = (style.dash || 0) * ratio;
        use(programs.line, { ...common, uColor: color, uWidth: style.width * ratio, uDash: dash, uRim: 0 });
        gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, lines.count);
      }
      if (dots && dots.count) {
        gl.bindVertexArray(dots.array);
        const size = style.size * ratio;
        use(programs.point, { ...common, uSizes: [0, size, size], uColor: color, uRing: style.ring || 0 });
        gl.drawArrays(gl.POINTS, 0, dots.count);
      }
    }
  }

  return { load, draw, start };
}
