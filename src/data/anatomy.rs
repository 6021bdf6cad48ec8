//! A synthetic abdomen: CT number and spleen label as a function of a point in the patient.
//!
//! Coordinates are reference millimetres, RAS+ (+x patient right, +y front, +z head), of an adult whose abdomen
//! fills about 380 x 380 x 270 mm around the origin. A scan only decides where the function is sampled, so
//! orientation, spacing and obliquity are exact. Every number of a patient is drawn once, in [`Anatomy::new`].
//!
//! The spleen cannot be had by a threshold: liver, pancreas, stomach and bowel wall and kidney medulla share its
//! CT numbers, muscle nearly does, it touches them in places, and contrast differs from patient to patient.

use crate::rng::Philox;

type Point = [f32; 3];

/// What is found at a point.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tissue {
    /// CT number in HU, without noise.
    pub hu: f32,
    /// Whether the point lies in the spleen.
    pub spleen: bool,
}

/// One patient.
pub struct Anatomy {
    body: Body,
    hu: Numbers,
    spleen: Spleen,
    liver: [Ellipsoid; 2],
    lesion: Option<Loop>,
    lungs: [Ellipsoid; 2],
    heart: Ellipsoid,
    stomach: Loop,
    kidneys: [Ellipsoid; 2],
    bowel: Vec<Loop>,
    /// No bowel above this z.
    bowel_top: f32,
    /// Centre of the vertebral bodies, and z of a disc.
    spine: [f32; 2],
    /// Distance of two ribs and z of one.
    ribs: [f32; 2],
    texture: [Wave; 4],
}

/// Outline and layers of the trunk.
struct Body {
    half: [f32; 2],
    /// 0 is an ellipse, 1 a rectangle (Fernandez-Guasti's squircle).
    squareness: f32,
    fat: f32,
    wall: f32,
    table: f32,
}

/// CT numbers of one patient in one contrast phase.
struct Numbers {
    fat: f32,
    muscle: f32,
    liver: f32,
    vein: f32,
    spleen: f32,
    wall: f32,
    pancreas: f32,
    cortex: f32,
    medulla: f32,
    aorta: f32,
}

/// Axis-parallel ellipsoid.
#[derive(Clone, Copy)]
struct Ellipsoid {
    centre: Point,
    inverse: Point,
}

impl Ellipsoid {
    fn new(centre: Point, radii: Point) -> Self {
        Ellipsoid { centre, inverse: radii.map(|r| 1.0 / r) }
    }

    /// 0 at the centre, 1 on the surface.
    fn level(&self, p: Point) -> f32 {
        let d: Point = std::array::from_fn(|i| (p[i] - self.centre[i]) * self.inverse[i]);
        d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    }
}

/// A hollow organ: wall outside `lumen` (a level), content inside, air in front of `air` (a y).
struct Loop {
    outer: Ellipsoid,
    /// Shear of z with x: a tilted organ without a rotation.
    shear: f32,
    lumen: f32,
    wall: f32,
    content: f32,
    air: f32,
}

impl Loop {
    fn at(&self, [x, y, z]: Point) -> Option<f32> {
        let level = self.outer.level([x + self.shear * (z - self.outer.centre[2]), y, z]);
        match level {
            l if l >= 1.0 => None,
            l if l >= self.lumen => Some(self.wall),
            _ if y > self.air => Some(-950.0),
            _ => Some(self.content),
        }
    }
}

/// A bent, lobulated, tilted ellipsoid with a notch at the hilum.
struct Spleen {
    centre: Point,
    /// Rows are the local axes: thickness, length, height.
    axes: [Point; 3],
    inverse: Point,
    bend: [f32; 2],
    notch: Point,
    notch_radius: f32,
    cyst: Option<Ellipsoid>,
    reach: f32,
}

/// Where a point lies relative to the spleen.
enum Near {
    Inside,
    Cyst,
    /// The thin layer around it.
    Layer,
    Away,
}

impl Spleen {
    fn at(&self, p: Point) -> Near {
        let d: Point = std::array::from_fn(|i| p[i] - self.centre[i]);
        if d.iter().map(|v| v * v).sum::<f32>() > self.reach * self.reach {
            return Near::Away;
        }
        let [x, y, z] = self.axes.map(|a| a[0] * d[0] + a[1] * d[1] + a[2] * d[2]);
        // Both ends bend towards the spine, so the outer face follows the ribs.
        let bent = [x - self.bend[0] * y * y - self.bend[1] * z * z + 4.0, y, z];
        let r: f32 = (0..3).map(|i| (bent[i] * self.inverse[i]).powi(2)).sum();
        let r = r * (1.0 + 0.06 * wave(0.0175 * y + 0.011 * z));
        let n = [x - self.notch[0], y - self.notch[1], 0.6 * (z - self.notch[2])];
        let notched = n.iter().map(|v| v * v).sum::<f32>() < self.notch_radius * self.notch_radius;
        match r {
            r if r < 1.0 && !notched => match self.cyst {
                Some(cyst) if cyst.level([x, y, z]) < 1.0 => Near::Cyst,
                _ => Near::Inside,
            },
            r if r < 1.25 => Near::Layer,
            _ => Near::Away,
        }
    }
}

/// A plane wave: HU amplitude, turns a mm along x, y, z, and phase in turns.
struct Wave {
    amplitude: f32,
    turns: Point,
    phase: f32,
}

/// A parabola's version of sin(2 pi t), |t| < 128: no libm call in the inner loop, so the same bits everywhere.
fn wave(t: f32) -> f32 {
    let t = t + 128.0;
    let x = 2.0 * (t - (t as i32) as f32) - 1.0;
    4.0 * x * (x.abs() - 1.0)
}

/// Position of `t` in its period, in 0..1, for |t| < 128.
fn phase(t: f32) -> f32 {
    let t = t + 128.0;
    t - (t as i32) as f32
}

/// Is (x, y) inside the ellipse at `c` with radii `r`?
fn in_ellipse([x, y]: [f32; 2], c: [f32; 2], r: [f32; 2]) -> bool {
    ((x - c[0]) / r[0]).powi(2) + ((y - c[1]) / r[1]).powi(2) < 1.0
}

impl Anatomy {
    /// Draws a patient.
    pub fn new(rng: &mut Philox) -> Self {
        let mut u = |low: f64, high: f64| rng.range(low, high) as f32;
        let half = [u(148.0, 168.0), u(110.0, 124.0)];
        let body = Body {
            half,
            squareness: u(0.15, 0.5),
            fat: u(7.0, 22.0),
            wall: u(8.0, 13.0),
            table: -half[1] - u(3.0, 8.0),
        };
        let enhanced = u(0.2, 1.0);
        let liver = 55.0 + 52.0 * enhanced + u(-4.0, 4.0);
        let spleen = liver + u(-5.0, 5.0);
        let hu = Numbers {
            fat: u(-112.0, -92.0),
            muscle: 50.0 + 10.0 * enhanced + u(-4.0, 4.0),
            liver,
            vein: liver + 5.0 + 35.0 * enhanced,
            spleen,
            wall: spleen + u(-12.0, 4.0),
            pancreas: spleen + u(-12.0, 3.0),
            cortex: spleen + 10.0 + 75.0 * enhanced,
            medulla: spleen + u(-6.0, 6.0),
            aorta: spleen + 60.0 * enhanced,
        };
        let lung_z = u(132.0, 158.0);
        let lung = |side: f32, x: f32, h: f32| {
            Ellipsoid::new([side * x, -4.0, lung_z], [0.4 * half[0], 0.75 * half[1], h])
        };
        let lungs = [lung(1.0, u(72.0, 82.0), u(88.0, 98.0)), lung(-1.0, u(72.0, 82.0), u(90.0, 102.0))];
        let liver = [
            Ellipsoid::new(
                [u(66.0, 78.0), u(2.0, 14.0), u(20.0, 38.0)],
                [u(74.0, 90.0), u(76.0, 90.0), u(68.0, 80.0)],
            ),
            Ellipsoid::new(
                [u(0.0, 14.0), u(42.0, 52.0), u(32.0, 50.0)],
                [u(60.0, 88.0), u(28.0, 38.0), u(28.0, 38.0)],
            ),
        ];
        let lesion = (u(0.0, 1.0) < 0.5).then(|| Loop {
            outer: Ellipsoid::new([u(60.0, 100.0), u(-20.0, 40.0), u(0.0, 60.0)], [u(6.0, 16.0); 3]),
            shear: 0.0,
            lumen: u(0.5, 0.8),
            wall: hu.liver + u(-15.0, 15.0),
            content: u(10.0, 60.0),
            air: f32::INFINITY,
        });
        let heart = Ellipsoid::new([-12.0, 25.0, lung_z + 15.0], [45.0, 42.0, u(52.0, 66.0)]);
        let stomach_y = u(28.0, 42.0);
        let stomach = Loop {
            outer: Ellipsoid::new(
                [u(-58.0, -44.0), stomach_y, u(16.0, 40.0)],
                [u(34.0, 45.0), u(31.0, 40.0), u(38.0, 52.0)],
            ),
            shear: u(-0.35, 0.35),
            lumen: u(0.52, 0.66),
            wall: hu.wall,
            content: match u(0.0, 1.0) {
                t if t < 0.5 => u(0.0, 40.0),
                // A full meal looks like an organ.
                t if t < 0.8 => hu.spleen + u(-25.0, 0.0),
                _ => u(140.0, 220.0),
            },
            air: stomach_y + u(-4.0, 16.0),
        };
        let spine_y = 55.0 - half[1];
        let mut kidney = |side: f32, z: f32| {
            Ellipsoid::new(
                [side * u(54.0, 66.0), spine_y + u(6.0, 16.0), z + u(-10.0, 10.0)],
                [u(23.0, 29.0), u(23.0, 29.0), u(44.0, 55.0)],
            )
        };
        let kidneys = [kidney(1.0, -53.0), kidney(-1.0, -45.0)];
        let size = u(0.94, 1.2);
        let spleen = Spleen::new(&mut u, &body, spine_y, size);
        let mut bowel: Vec<Loop> = (0..16)
            .map(|_| {
                let centre = [u(-98.0, 98.0), u(-5.0, 75.0), u(-128.0, -28.0)];
                Loop {
                    outer: Ellipsoid::new(centre, [u(14.0, 27.0), u(14.0, 25.0), u(14.0, 30.0)]),
                    shear: u(-0.4, 0.4),
                    lumen: u(0.0, 0.75),
                    wall: hu.wall + u(-6.0, 6.0),
                    content: u(10.0, 80.0),
                    air: if u(0.0, 1.0) < 0.5 { centre[1] + u(0.0, 8.0) } else { f32::INFINITY },
                }
            })
            .collect();
        let flexure = [0.66 * -half[0], u(22.0, 40.0), u(-34.0, -12.0)];
        bowel.push(Loop {
            outer: Ellipsoid::new(flexure, [u(15.0, 20.0), u(15.0, 20.0), u(22.0, 34.0)]),
            shear: u(-0.4, 0.4),
            lumen: 0.6,
            wall: hu.wall,
            content: u(-120.0, 50.0),
            air: flexure[1] + u(0.0, 6.0),
        });
        let bowel_top =
            bowel.iter().map(|l| l.outer.centre[2] + 1.0 / l.outer.inverse[2]).fold(f32::MIN, f32::max);
        let texture = std::array::from_fn(|i| {
            // Two broad waves (uneven perfusion, cupping) and two that mottle the parenchyma.
            let (f, amplitude) = if i < 2 { (0.012, u(2.0, 4.5)) } else { (0.07, u(2.0, 4.0)) };
            let turns = [u(0.3, 1.0), u(-1.0, 1.0), u(0.3, 1.0)].map(|t| f * t);
            Wave { amplitude, turns, phase: u(0.0, 1.0) }
        });
        Anatomy {
            spine: [spine_y, u(0.0, 1.0)],
            ribs: [u(24.0, 30.0), u(0.0, 1.0)],
            body,
            hu,
            spleen,
            liver,
            lesion,
            lungs,
            heart,
            stomach,
            kidneys,
            bowel,
            bowel_top,
            texture,
        }
    }

    /// CT number and label at a point, in reference mm.
    pub fn at(&self, p: Point) -> Tissue {
        let (hu, spleen) = self.paint(p);
        if hu < -300.0 {
            return Tissue { hu, spleen };
        }
        let texture: f32 = self
            .texture
            .iter()
            .map(|w| w.amplitude * wave(w.turns[0] * p[0] + w.turns[1] * p[1] + w.turns[2] * p[2] + w.phase))
            .sum();
        Tissue { hu: hu + texture, spleen }
    }

    /// The layers of the trunk, outside in.
    fn paint(&self, p: Point) -> (f32, bool) {
        let [x, y, _] = p;
        let b = &self.body;
        let (u, v) = (x / b.half[0], y / b.half[1]);
        let level = u * u + v * v - b.squareness * u * u * v * v;
        if level >= 1.0 {
            let table = y < b.table && y > b.table - 6.0 && x.abs() < 170.0;
            return (if table { -250.0 } else { -1000.0 }, false);
        }
        // Distance to the skin to first order: (1 - q) / |grad q| with q the root of the level.
        let depth = if level < 0.25 {
            f32::INFINITY
        } else {
            let q = level.sqrt();
            (1.0 - q) * q / ((u / b.half[0]).powi(2) + (v / b.half[1]).powi(2)).sqrt()
        };
        if depth < 2.0 {
            return (10.0, false);
        }
        if let Some(hu) = self.spine(p) {
            return (hu, false);
        }
        let back = [x.abs(), y];
        if depth > 4.0 && in_ellipse(back, [38.0, self.spine[0] - 24.0], [30.0, 19.0]) {
            return (self.hu.muscle, false);
        }
        match depth - b.fat {
            d if d < 0.0 => (self.hu.fat, false),
            d if d < b.wall => (self.rib(p, d - 0.5 * b.wall).unwrap_or(self.hu.muscle), false),
            _ => self.cavity(p),
        }
    }

    /// Vertebrae, discs, canal and spinous processes.
    fn spine(&self, [x, y, z]: Point) -> Option<f32> {
        let c = self.spine[0];
        if x.abs() > 23.0 || y > c + 18.0 {
            return None;
        }
        let disc = phase(z / 36.0 + self.spine[1]) < 0.2;
        let body = (x / 22.0).powi(2) + ((y - c) / 17.0).powi(2);
        if in_ellipse([x, y], [0.0, c - 22.0], [8.0, 7.0]) {
            return Some(28.0);
        }
        match body {
            b if b < 1.0 && disc => return Some(80.0),
            b if b < 0.72 => return Some(190.0),
            b if b < 1.0 => return Some(420.0),
            _ => {}
        }
        let arch = in_ellipse([x, y], [0.0, c - 22.0], [14.0, 12.0]);
        let process = x.abs() < 3.5 && y < c - 28.0 && y > c - 48.0;
        ((arch || process) && !disc).then_some(340.0)
    }

    /// A rib at `off` mm from the middle of the wall; ribs descend to the front.
    fn rib(&self, [_, y, z]: Point, off: f32) -> Option<f32> {
        let t = phase((z + 0.35 * y) / self.ribs[0] + self.ribs[1]);
        (off.abs() < 4.0 && t < 0.33 && z > -75.0 && y < 85.0).then(|| {
            let cortex = off.abs() > 2.4 || !(0.07..0.26).contains(&t);
            if cortex { 480.0 } else { 220.0 }
        })
    }

    /// Everything inside the wall, foremost first.
    fn cavity(&self, p: Point) -> (f32, bool) {
        let [x, y, z] = p;
        let hu = &self.hu;
        let spine_y = self.spine[0];
        if in_ellipse([x, y], [-10.0, spine_y + 28.0], [11.0, 11.0]) {
            return (hu.aorta, false);
        }
        let near = self.spleen.at(p);
        match near {
            Near::Inside => return (hu.spleen, true),
            // A cyst belongs to the organ, as annotators draw it.
            Near::Cyst => return (12.0, true),
            Near::Layer | Near::Away => {}
        }
        if in_ellipse([x, y], [20.0, spine_y + 33.0], [12.0, 10.0]) {
            return (hu.vein, false);
        }
        let lung = self.lungs.iter().map(|l| l.level(p)).fold(f32::INFINITY, f32::min);
        if matches!(near, Near::Layer) {
            if lung < 1.0 {
                return (hu.muscle, false);
            }
            // A plane of fat in places, contact with the neighbour in others.
            if wave(0.021 * y + 0.016 * z) > -0.35 {
                return (hu.fat, false);
            }
        }
        if let Some(hu) = self.stomach.at(p) {
            return (hu, false);
        }
        let tail_y = 10.0 - 0.0042 * (x + 20.0) * (x + 20.0);
        if x > -92.0 && x < 42.0 && (y - tail_y).powi(2) + (z + 2.0 + 0.12 * x).powi(2) < 121.0 {
            return (hu.pancreas, false);
        }
        if lung < 1.0 {
            return (-860.0, false);
        }
        if lung < 1.05 {
            return (hu.muscle, false);
        }
        if self.liver.iter().any(|l| l.level(p) < 1.0) {
            let lesion = self.lesion.as_ref().and_then(|l| l.at(p));
            let vessel = wave(0.0135 * x + 0.0065 * z) * wave(0.012 * y - 0.008 * z + 0.16) > 0.955;
            return (lesion.unwrap_or(if vessel { hu.vein } else { hu.liver }), false);
        }
        for kidney in &self.kidneys {
            match kidney.level(p) {
                l if l < 0.16 => return (25.0, false),
                l if l < 0.55 => return (hu.medulla, false),
                l if l < 1.0 => return (hu.cortex, false),
                l if l < 1.35 => return (hu.fat, false),
                _ => {}
            }
        }
        let side = [x.abs(), y];
        let psoas = z < 0.0 && in_ellipse(side, [36.0, spine_y + 6.0], [15.0, 15.0]);
        let crus = (0.0..90.0).contains(&z) && in_ellipse(side, [16.0, spine_y + 22.0], [7.0, 12.0]);
        if psoas || crus {
            return (hu.muscle, false);
        }
        if z < self.bowel_top
            && let Some(hu) = self.bowel.iter().find_map(|l| l.at(p))
        {
            return (hu, false);
        }
        (if self.heart.level(p) < 1.0 { hu.vein } else { hu.fat }, false)
    }
}

impl Spleen {
    fn new(u: &mut impl FnMut(f64, f64) -> f32, body: &Body, spine_y: f32, size: f32) -> Self {
        let radii = [u(22.0, 26.0), u(42.0, 50.0), u(46.0, 56.0)].map(|r| r * size);
        let outer = body.half[0] - body.fat - body.wall;
        let centre = [-outer + radii[0] + u(2.0, 8.0), spine_y + u(20.0, 36.0), u(4.0, 32.0)];
        let turn = |degrees: f32| degrees.to_radians().sin_cos();
        let ((sx, cx), (sy, cy), (sz, cz)) = (turn(u(-18.0, 18.0)), turn(u(-8.0, 12.0)), turn(u(10.0, 34.0)));
        // Rows of (Rz Ry Rx) transposed: the local axes in the patient.
        let axes = [
            [cz * cy, sz * cy, -sy],
            [cz * sy * sx - sz * cx, sz * sy * sx + cz * cx, cy * sx],
            [cz * sy * cx + sz * sx, sz * sy * cx - cz * sx, cy * cx],
        ];
        let cyst = u(0.0, 1.0) < 0.15;
        let at = [u(-6.0, 6.0), u(-14.0, 14.0), u(-18.0, 18.0)];
        let cyst_radius = u(5.0, 9.0);
        Spleen {
            centre,
            axes,
            inverse: radii.map(|r| 1.0 / r),
            bend: [u(0.0025, 0.006), u(0.0005, 0.003)],
            notch: [radii[0] * u(0.8, 1.1), u(-15.0, 15.0), u(-15.0, 15.0)],
            notch_radius: u(9.0, 15.0),
            cyst: cyst.then(|| Ellipsoid::new(at, [cyst_radius; 3])),
            reach: 1.4 * radii[2].max(radii[1]),
        }
    }
}
