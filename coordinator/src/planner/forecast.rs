//! How many requests will come: Holt's linear method with a damped trend.
//!
//! E. S. Gardner and E. McKenzie, *Forecasting Trends in Time Series*, Management Science 31(10),
//! 1985. Without damping a trend seen in a burst would be drawn out over the whole start-up time
//! of a worker; a damped one flattens out, and the method does as well as any simple one over many
//! kinds of series (Makridakis and Hibon, *The M3-Competition*, 2000). Nothing has to be known
//! beforehand, and a forecast costs a dozen operations.
//!
//! A pool that is sized for the expected rate is too small half of the time. By how much the rate
//! exceeds what was expected is tracked too: a margin that rises with each forecast that was
//! exceeded and falls with each that was not, so that it ends up at the wanted quantile whatever
//! the series is (online quantile tracking; Angelopoulos, Candès and Tibshirani, *Conformal PID
//! Control for Time Series Prediction*, 2023).

use std::collections::VecDeque;

/// The weight of the newest value in the level, and of the newest change in the trend.
const LEVEL: f64 = 0.4;
const TREND: f64 = 0.15;
/// What is left of a trend after one interval.
const DAMPING: f64 = 0.9;
/// The weight of the newest error.
const ERROR: f64 = 0.05;
/// Bounds of the dispersion.
const DISPERSION: (f64, f64) = (1.0, 25.0);

/// The margin at first, its bounds, and how fast it moves.
const MARGIN: f64 = 1.15;
const MARGINS: (f64, f64) = (1.0, 2.0);
const MARGIN_STEP: f64 = 0.08;

/// A series of rates, one for each interval.
#[derive(Clone, Debug, Default)]
pub struct Forecast {
    level: f64,
    trend: f64,
    /// Mean square of what the forecast of one interval was wrong by, of the counts' mean.
    dispersion: f64,
    margin: Option<f64>,
    /// What was forecast: until which count, and the rate.
    told: VecDeque<(u64, f64)>,
    last: f64,
    seen: u64,
}

impl Forecast {
    /// Takes the next interval's count.
    pub fn push(&mut self, count: f64, seconds: f64) {
        if seconds <= 0.0 {
            return;
        }
        let rate = count / seconds;
        if self.seen == 0 {
            self.level = rate;
        } else {
            let expected = self.level + DAMPING * self.trend;
            let error = (rate - expected) * seconds;
            let mean = (expected * seconds).max(1.0);
            self.dispersion += ERROR * (error * error / mean - self.dispersion);
            let level = LEVEL * rate + (1.0 - LEVEL) * expected;
            self.trend = TREND * (level - self.level) + (1.0 - TREND) * DAMPING * self.trend;
            self.level = level.max(0.0);
        }
        self.seen += 1;
        self.last = rate;
    }

    /// The rate that is not exceeded until `intervals` from now, with this probability.
    pub fn bound(&mut self, intervals: f64, probability: f64) -> f64 {
        let mut margin = self.margin.unwrap_or(MARGIN);
        // Of the last rate and the level: one count alone is noise.
        let now = f64::midpoint(self.last, self.level);
        while self.told.front().is_some_and(|(due, _)| *due <= self.seen) {
            let Some((_, told)) = self.told.pop_front() else { break };
            let exceeded = f64::from(u8::from(now > told * margin));
            margin += MARGIN_STEP * (exceeded - (1.0 - probability));
        }
        margin = margin.clamp(MARGINS.0, MARGINS.1);
        self.margin = Some(margin);
        let highest = self.highest(intervals);
        if self.seen > 0 {
            self.told.push_back((self.seen + intervals.ceil().max(1.0) as u64, highest));
        }
        highest * margin
    }

    /// The highest rate expected from now to `intervals` from now.
    pub fn highest(&self, intervals: f64) -> f64 {
        // φ + φ² + … + φʰ
        let damped = DAMPING * (1.0 - DAMPING.powf(intervals.max(0.0))) / (1.0 - DAMPING);
        // A trend takes a series to twice what it was at most: more was never seen.
        let rise = (self.trend * damped).clamp(0.0, self.level);
        self.level + rise
    }

    /// The rate now, without noise.
    pub fn level(&self) -> f64 {
        self.level
    }

    /// The variance of a count of its mean: 1 for a Poisson process, more for bursts.
    pub fn dispersion(&self) -> f64 {
        self.dispersion.clamp(DISPERSION.0, DISPERSION.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_series_is_forecast_as_it_is() {
        let mut forecast = Forecast::default();
        (0..100).for_each(|_| forecast.push(50.0, 10.0));
        assert!((forecast.highest(6.0) - 5.0).abs() < 1e-9, "{forecast:?}");
        assert_eq!(forecast.dispersion(), 1.0);
    }

    #[test]
    fn a_rising_series_is_forecast_higher_and_never_without_bound() {
        let mut forecast = Forecast::default();
        (0..60).for_each(|i| forecast.push(10.0 + f64::from(i), 1.0));
        let (now, soon, never) = (forecast.level(), forecast.highest(5.0), forecast.highest(1e9));
        assert!(now < soon && soon < never && never <= 2.0 * now, "{now} {soon} {never}");
        // The true value five intervals later is 74.
        assert!((soon - 74.0).abs() < 4.0, "{soon}");
    }

    #[test]
    fn the_bound_is_exceeded_as_often_as_was_asked_for() {
        // Swings that the trend sees too late.
        let rate = |i: u32| 100.0 + 40.0 * (f64::from(i) / 15.0).sin();
        let mut forecast = Forecast::default();
        let mut bounds = Vec::new();
        for i in 0..4000 {
            forecast.push(rate(i), 1.0);
            bounds.push(forecast.bound(6.0, 0.9));
        }
        let exceeded = (2000..3990).filter(|&i| rate(i as u32 + 6) > bounds[i]).count();
        let share = exceeded as f64 / 1990.0;
        assert!((0.02..0.2).contains(&share), "{share}");
    }

    #[test]
    fn a_falling_series_is_not_forecast_below_what_it_is() {
        let mut forecast = Forecast::default();
        (0..60).for_each(|i| forecast.push(f64::from(60 - i), 1.0));
        assert_eq!(forecast.highest(10.0), forecast.level());
    }
}
