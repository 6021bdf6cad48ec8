//! Streams, events and graphs of the emulated device: what runs when.
//!
//! Queued work does not run until somebody waits for it. Seed 0 runs as little as that allows, so a copy to pinned
//! memory or another stream's kernel that nobody waited for has visibly not happened. Other seeds run whatever the
//! events allow, in any order and at any time. Both are legal, and a program must not notice.

use super::Options;
use super::machine::{Entry, Machine};
use crate::device::cuda::driver::Launch;
use crate::error::{Error, Result};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

/// One item of a stream. Host addresses are numbers: they are followed when the item runs.
#[derive(Clone, Debug)]
pub enum Work {
    Launch { entry: Entry, launch: Launch, args: Arc<[u8]> },
    CopyIn { to: u64, from: usize, bytes: usize },
    CopyOut { to: usize, from: u64, bytes: usize },
    Copy { to: u64, from: u64, bytes: usize },
    Fill { to: u64, byte: u8, bytes: usize },
    Taken { address: u64, bytes: usize },
    Dropped { address: u64 },
    Record(usize),
    Wait(usize),
}

/// Work that is kept instead of run. A stream that waits for an event of it takes part from then on.
struct Capture {
    origin: usize,
    streams: HashSet<usize>,
    events: HashSet<usize>,
    work: Vec<(usize, Work)>,
}

impl Capture {
    /// A stream of the capture with work that its origin does not wait for in the end.
    fn unjoined(&self) -> Option<usize> {
        let mut joined = HashSet::from([self.origin]);
        let mut awaited = HashSet::new();
        for (stream, work) in self.work.iter().rev() {
            if matches!(work, Work::Record(event) if awaited.contains(event)) {
                joined.insert(*stream);
            }
            if !joined.contains(stream) {
                return Some(*stream);
            }
            if let Work::Wait(event) = work {
                awaited.insert(*event);
            }
        }
        None
    }
}

/// Captured work; stream numbers other than the origin's are the graph's own.
struct Graph {
    origin: usize,
    work: Arc<[(usize, Work)]>,
}

/// All streams of a device and the machine that runs their work.
pub struct Queue {
    pub machine: Machine,
    seed: u64,
    host_threads: Option<u32>,
    block_seconds: u32,
    random: u64,
    launches: u64,
    streams: Vec<VecDeque<Work>>,
    /// Whether each event has happened.
    events: Vec<bool>,
    capture: Option<Capture>,
    graphs: Vec<Graph>,
    /// What went wrong first: from then on the device refuses everything, as a real one does.
    failed: Option<String>,
}

impl Queue {
    /// One stream, nothing queued.
    pub fn new(machine: Machine, seed: u64, options: &Options) -> Self {
        Queue {
            machine,
            seed,
            host_threads: options.host_threads,
            block_seconds: options.block_seconds,
            random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            launches: 0,
            streams: vec![VecDeque::new()],
            events: Vec::new(),
            capture: None,
            graphs: Vec::new(),
            failed: None,
        }
    }

    /// The error of earlier work, if any.
    pub fn check(&self) -> Result<()> {
        self.failed.as_ref().map_or(Ok(()), |text| Err(Error::Internal(text.clone())))
    }

    pub fn new_stream(&mut self) -> usize {
        self.streams.push(VecDeque::new());
        self.streams.len() - 1
    }

    /// Queues one item.
    pub fn push(&mut self, stream: usize, work: Work) -> Result<()> {
        self.check()?;
        if let Some(capture) = &mut self.capture {
            if let Work::Wait(event) = work {
                if capture.events.contains(&event) {
                    capture.streams.insert(stream);
                } else if capture.streams.contains(&stream) {
                    return Err(internal("a captured stream cannot wait for work outside the capture"));
                }
            }
            if capture.streams.contains(&stream) {
                if let Work::Record(event) = work {
                    capture.events.insert(event);
                }
                capture.work.push((stream, work));
                return Ok(());
            }
        }
        self.streams[stream].push_back(work);
        while self.seed != 0 && self.draw(4) == 0 && self.run_any() {}
        Ok(())
    }

    /// Queues a new event.
    pub fn record(&mut self, stream: usize) -> Result<usize> {
        self.events.push(false);
        let event = self.events.len() - 1;
        self.push(stream, Work::Record(event))?;
        Ok(event)
    }

    /// Runs until nothing is left on `stream`.
    pub fn synchronize(&mut self, stream: usize) -> Result<()> {
        if self.capture.as_ref().is_some_and(|capture| capture.streams.contains(&stream)) {
            return Err(internal("a stream cannot be waited for while it is captured"));
        }
        while !self.streams[stream].is_empty() {
            if self.seed != 0 {
                self.run_any();
            } else {
                self.run_one(self.needed_first(stream));
            }
        }
        self.check()
    }

    /// Runs all there is. Errors stay with the device.
    pub fn drain(&mut self) {
        for stream in 0..self.streams.len() {
            if self.synchronize(stream).is_err() {
                return;
            }
        }
    }

    pub fn begin_capture(&mut self, stream: usize) -> Result<()> {
        self.check()?;
        if self.capture.is_some() {
            return Err(internal("one capture at a time"));
        }
        self.capture = Some(Capture {
            origin: stream,
            streams: HashSet::from([stream]),
            events: HashSet::new(),
            work: Vec::new(),
        });
        Ok(())
    }

    pub fn end_capture(&mut self, stream: usize) -> Result<usize> {
        self.check()?;
        let capture = self.capture.take().filter(|capture| capture.origin == stream);
        let Some(capture) = capture else {
            return Err(internal("no capture began on this stream"));
        };
        if let Some(stream) = capture.unjoined() {
            return Err(internal(&format!("the capture's stream does not wait for stream {stream}")));
        }
        let mut own = HashMap::from([(capture.origin, capture.origin)]);
        for stream in &capture.streams {
            if *stream != capture.origin {
                own.insert(*stream, self.new_stream());
            }
        }
        let work = capture.work.into_iter().map(|(stream, work)| (own[&stream], work)).collect();
        self.graphs.push(Graph { origin: capture.origin, work });
        Ok(self.graphs.len() - 1)
    }

    /// Queues all work of a graph, with events of its own.
    pub fn replay(&mut self, stream: usize, graph: usize) -> Result<()> {
        let Graph { origin, work } = &self.graphs[graph];
        let (origin, work) = (*origin, work.clone());
        let mut events = HashMap::new();
        for (on, item) in work.iter() {
            let on = if *on == origin { stream } else { *on };
            match item {
                Work::Record(event) => {
                    events.insert(*event, self.record(on)?);
                }
                Work::Wait(event) => self.push(on, Work::Wait(events[event]))?,
                other => self.push(on, other.clone())?,
            }
        }
        Ok(())
    }

    fn draw(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 32) % below
    }

    /// The event that the next item of a stream waits for in vain.
    fn blocked_by(&self, stream: usize) -> Option<usize> {
        match self.streams[stream].front() {
            Some(Work::Wait(event)) if !self.events[*event] => Some(*event),
            _ => None,
        }
    }

    /// The stream whose next item must run before `stream` can go on. Events are recorded before they are waited
    /// for, so this ends.
    fn needed_first(&self, mut stream: usize) -> usize {
        while let Some(event) = self.blocked_by(stream) {
            let records = |work: &Work| matches!(work, Work::Record(recorded) if *recorded == event);
            stream = (self.streams.iter().position(|queue| queue.iter().any(records)))
                .expect("an event that has not happened is queued");
        }
        stream
    }

    /// Runs one item of a stream drawn from those that can go on; false when there is none.
    fn run_any(&mut self) -> bool {
        let can_run = |s: &usize| !self.streams[*s].is_empty() && self.blocked_by(*s).is_none();
        let streams: Vec<usize> = (0..self.streams.len()).filter(can_run).collect();
        if streams.is_empty() {
            return false;
        }
        let drawn = self.draw(streams.len() as u64) as usize;
        self.run_one(streams[drawn]);
        true
    }

    fn run_one(&mut self, stream: usize) {
        let Some(work) = self.streams[stream].pop_front() else { return };
        let machine = &mut self.machine;
        let result = match work {
            Work::Launch { entry, launch, args } => {
                self.launches += 1;
                let seed = match self.seed {
                    0 => 0,
                    seed => seed.wrapping_add(self.launches << 32),
                };
                let host_threads = self.host_threads.unwrap_or_else(|| host_threads_for(launch));
                machine.launch(entry, launch, &args, seed, host_threads, self.block_seconds)
            }
            Work::CopyIn { to, from, bytes } => machine.copy_in(to, from, bytes),
            Work::CopyOut { to, from, bytes } => machine.copy_out(to, from, bytes),
            Work::Copy { to, from, bytes } => machine.copy(to, from, bytes),
            Work::Fill { to, byte, bytes } => machine.fill(to, byte, bytes),
            Work::Taken { address, bytes } => {
                machine.block_taken(address, bytes);
                Ok(())
            }
            Work::Dropped { address } => {
                machine.block_dropped(address);
                Ok(())
            }
            Work::Record(event) => {
                self.events[event] = true;
                Ok(())
            }
            Work::Wait(_) => Ok(()),
        };
        if let Err(text) = result {
            self.failed.get_or_insert(text);
            self.streams.iter_mut().for_each(VecDeque::clear);
        }
    }
}

fn internal(text: &str) -> Error {
    Error::Internal(text.into())
}

/// All cores for a launch that takes longer than starting threads does.
fn host_threads_for(launch: Launch) -> u32 {
    let blocks: u64 = launch.grid.iter().map(|&n| u64::from(n)).product();
    if blocks < 4 || blocks * u64::from(launch.threads) < 1 << 14 {
        return 1;
    }
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}
