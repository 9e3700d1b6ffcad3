/* Drives every entry point of the compiled core with random shapes beside naive loops: driver ROUNDS SEED [TRIAL [ROUND]].
   A round is one of each trial at one batch, with one thread or three. Ends with 1 at the first difference. */
#include "conv_trials.h"
#include "layout_trials.h"
#include "linear_trials.h"
#include "windows_trials.h"

Chance chance;
long checks;
double worst;
const char *trial;
int round_now, batch_now;

extern "C" int32_t nk_runs_here(void); /* of probe.cpp */

int main(int count, char **words) {
  int rounds = count > 1 ? atoi(words[1]) : 100;
  uint64_t seed = count > 2 ? strtoull(words[2], nullptr, 10) : 0;
  struct {
    const char *name;
    void (*run)(int batch);
  } trials[] = {{"pack", pack_trial},     {"linear", linear_trial},          {"spoilt-linear", spoilt_linear_trial},
                {"pool", pool_trial},     {"conv", conv_trial},              {"spoilt-conv", spoilt_conv_trial},
                {"columns", columns_trial}, {"dense", dense_trial},          {"depth", depth_trial},
                {"windows-pool", window_pool_trial}, {"linear-layout", linear_layout_trial},
                {"conv-layout", conv_layout_trial}};
  if (!nk_runs_here()) {
    printf("not run: this processor has not what it needs\n");
    return 0;
  }
  for (int round = count > 4 ? atoi(words[4]) : 0; round < rounds; round++)
    for (auto &each : trials) {
      if (count > 3 && strcmp(words[3], each.name)) continue;
      chance.state = seed * 1000003 + (uint64_t)round * 31;
      for (int i = 0; i < 8; i++) chance.bits();
      round_now = round, batch_now = round % 40 + 1;
      must(nk_threads(chance.coin() ? 3 : 1), "nk_threads");
      each.run(batch_now);
    }
  if (nk_threads(0) == 0 || nk_threads(65) == 0) wrong("an absurd number of threads was taken");
  printf("%d lanes, %d rounds, %ld values agree, the worst differs by %.1e of its terms\n", (int)nk_lanes(), rounds, checks,
         worst);
  return 0;
}
