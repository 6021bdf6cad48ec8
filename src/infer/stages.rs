//! Three stages of work on many cases at once: while one is predicted, the next is read and the last one finished.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;

use crate::Result;

/// What is done to every job.
pub struct Stages<R, P, F> {
    /// From the job to what the network needs.
    pub read: R,
    /// The network; runs on the calling thread.
    pub predict: P,
    /// From its answer to the result.
    pub finish: F,
}

/// Takes every job through the stages; `done` is told of each result as it comes, in the order of `jobs`, which is
/// also that of the answer. An error of one job does not keep the others.
///
/// When `stop` becomes true no further job is begun and those under way are finished: the answer is then shorter
/// than `jobs`. Each stage holds one case and hands it on only when the next is free, so three are in memory.
pub fn run<J, A, B, C, R, P, F>(
    jobs: &[J],
    stop: &AtomicBool,
    stages: Stages<R, P, F>,
    mut done: impl FnMut(&J, &Result<C>) + Send,
) -> Vec<Result<C>>
where
    J: Sync,
    A: Send,
    B: Send,
    C: Send,
    R: Fn(&J) -> Result<A> + Send,
    P: Fn(A) -> Result<B>,
    F: Fn(&J, B) -> Result<C> + Send,
{
    let Stages { read, predict, finish } = stages;
    // No buffer: a rendezvous.
    let (to_predict, to_predict_from) = sync_channel::<(&J, Result<A>)>(0);
    let (to_finish, to_finish_from) = sync_channel::<(&J, Result<B>)>(0);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for job in jobs.iter().take_while(|_| !stop.load(Ordering::Relaxed)) {
                // Nobody listens only after a panic, which the scope hands on.
                if to_predict.send((job, read(job))).is_err() {
                    return;
                }
            }
        });
        let finisher = scope.spawn(move || {
            let mut results = Vec::new();
            for (job, predicted) in to_finish_from {
                let result = predicted.and_then(|predicted| finish(job, predicted));
                done(job, &result);
                results.push(result);
            }
            results
        });
        for (job, ready) in to_predict_from {
            if to_finish.send((job, ready.and_then(&predict))).is_err() {
                break;
            }
        }
        drop(to_finish);
        finisher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
