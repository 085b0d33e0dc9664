// The native module of gist_kernels. It links against neither torch nor Python's numeric packages:
// tensors arrive as addresses and strides, checked by the Python modules beside this file.

#include <nanobind/nanobind.h>

#include <string>

#include "adapter.h"
#include "attention.h"
#include "loss.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace nb = nanobind;

namespace {

using std::int64_t;
using Address = std::uintptr_t;

int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

nb::list instruction_sets() {
  nb::list names;
  for (int i = 0; gist::instruction_sets(i) != nullptr; ++i)
    names.append(gist::instruction_sets(i));
  return names;
}

void use_instruction_set(const char *name) {
  if (gist::use_instruction_set(name)) return;
  std::string text =
      "'" + std::string(name) + "' is no instruction set of this build and processor";
  for (int i = 0; gist::instruction_sets(i) != nullptr; ++i)
    text += (i == 0 ? "; it has " : ", ") + std::string(gist::instruction_sets(i));
  throw nb::value_error(text.c_str());
}

void *pointer(Address address) { return reinterpret_cast<void *>(address); }

// Forward where there is a loss to write, else backward; returns what loss_forward does. One flat
// call is the cheapest to make from Python; loss.py beside this file says what the arguments are.
int64_t run_loss(int dtype, int64_t rows, int64_t classes, Address cls, int64_t cls_stride,
                 Address gist, int64_t gist_stride, int target_dtype, Address target,
                 int64_t target_stride, double temperature, double cls_weight, double gist_weight,
                 double kl_cls_gist_weight, double kl_gist_cls_weight, double label_smoothing,
                 int64_t ignore_index, const char *reduction, Address stats, Address loss,
                 Address terms, Address grad, int64_t grad_stride, Address d_cls, Address d_gist,
                 int64_t d_stride, int threads) {
  const nb::gil_scoped_release release;
  gist::LossCall call = {};
  call.rows = rows;
  call.classes = classes;
  call.dtype = static_cast<gist::Dtype>(dtype);
  call.logits[gist::kCls] = pointer(cls);
  call.logits[gist::kGist] = pointer(gist);
  call.logit_stride[gist::kCls] = cls_stride;
  call.logit_stride[gist::kGist] = gist_stride;
  call.target_dtype = static_cast<gist::Dtype>(target_dtype);
  call.target = pointer(target);
  call.target_stride = target_stride;
  call.temperature = temperature;
  call.weights[0] = cls_weight;
  call.weights[1] = gist_weight;
  call.weights[2] = kl_cls_gist_weight;
  call.weights[3] = kl_gist_cls_weight;
  call.label_smoothing = label_smoothing;
  call.ignore_index = ignore_index;
  call.reduction = reduction[0] == 'n'   ? gist::Reduction::none
                   : reduction[0] == 's' ? gist::Reduction::sum
                                         : gist::Reduction::mean;
  call.stats = pointer(stats);
  call.loss = pointer(loss);
  call.terms = pointer(terms);
  call.grad = pointer(grad);
  call.grad_stride = grad_stride;
  call.d_logits[gist::kCls] = pointer(d_cls);
  call.d_logits[gist::kGist] = pointer(d_gist);
  call.d_logits_stride = d_stride;
  if (loss != 0) return gist::loss_forward(call, threads);
  gist::loss_backward(call, threads);
  return -1;
}

// adapter.py beside this file says what the arguments are; what one direction does not use is 0.
void run_adapter(bool backward, int dtype, int64_t rows, int64_t width, int64_t rank,
                 int activation, double scale, bool has_norm, double eps, Address x,
                 int64_t x_stride, Address add, int64_t add_stride, Address d_out,
                 int64_t d_out_stride, Address d_normed, int64_t d_normed_stride, Address normed,
                 Address out, Address dx, bool pass_through, Address stats, Address z,
                 Address norm_weight, Address norm_bias, Address bias, Address down_weight,
                 Address down_bias, Address up_weight, Address up_bias, Address d_down_weight,
                 Address d_down_bias, Address d_up_weight, Address d_up_bias, int threads) {
  const nb::gil_scoped_release release;
  gist::AdapterCall call = {};
  call.rows = rows;
  call.width = width;
  call.rank = rank;
  call.dtype = static_cast<gist::Dtype>(dtype);
  call.activation = static_cast<gist::Activation>(activation);
  call.has_norm = has_norm;
  call.eps = eps;
  call.scale = scale;
  call.x = pointer(x);
  call.x_stride = x_stride;
  call.add = pointer(add);
  call.add_stride = add_stride;
  call.d_out = pointer(d_out);
  call.d_out_stride = d_out_stride;
  call.d_normed = pointer(d_normed);
  call.d_normed_stride = d_normed_stride;
  call.normed = pointer(normed);
  call.out = pointer(out);
  call.dx = pointer(dx);
  call.pass_through = pass_through;
  call.stats = pointer(stats);
  call.z = pointer(z);
  call.norm_weight = pointer(norm_weight);
  call.norm_bias = pointer(norm_bias);
  call.bias = pointer(bias);
  call.down_weight = pointer(down_weight);
  call.down_bias = pointer(down_bias);
  call.up_weight = pointer(up_weight);
  call.up_bias = pointer(up_bias);
  call.d_down_weight = pointer(d_down_weight);
  call.d_down_bias = pointer(d_down_bias);
  call.d_up_weight = pointer(d_up_weight);
  call.d_up_bias = pointer(d_up_bias);
  backward ? gist::adapter_backward(call, threads) : gist::adapter_forward(call, threads);
}

void run_activation(int dtype, int64_t size, int activation, Address u, Address d, Address to,
                    int threads) {
  const nb::gil_scoped_release release;
  gist::ActivationCall call = {};
  call.size = size;
  call.dtype = static_cast<gist::Dtype>(dtype);
  call.activation = static_cast<gist::Activation>(activation);
  call.u = pointer(u);
  call.d = pointer(d);
  call.to = pointer(to);
  gist::run_activation(call, threads);
}

// Address, stride of the batch, stride of rows; the address 0 stands for no tensor.
gist::AttentionTensor attention_tensor(const nb::tuple &place) {
  return {pointer(nb::cast<Address>(place[0])), nb::cast<int64_t>(place[1]),
          nb::cast<int64_t>(place[2])};
}

// Forward without d_out, else backward.
void run_attention(int dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
                   int64_t head_dim, double scale, const nb::tuple &q, const nb::tuple &k,
                   const nb::tuple &v, const nb::tuple &out, Address lse, const nb::tuple &d_out,
                   const nb::tuple &d_q, const nb::tuple &d_k, const nb::tuple &d_v, int threads) {
  gist::AttentionCall call = {};
  call.dtype = static_cast<gist::AttentionDtype>(dtype);
  call.batch = batch;
  call.heads = heads;
  call.queries = queries;
  call.keys = keys;
  call.head_dim = head_dim;
  call.scale = scale;
  call.q = attention_tensor(q);
  call.k = attention_tensor(k);
  call.v = attention_tensor(v);
  call.out = attention_tensor(out);
  call.lse = static_cast<float *>(pointer(lse));
  call.d_out = attention_tensor(d_out);
  call.d_q = attention_tensor(d_q);
  call.d_k = attention_tensor(d_k);
  call.d_v = attention_tensor(d_v);
  const nb::gil_scoped_release release;
  gist::attention(call, threads);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "CPU side of gist_kernels, independent of torch.";
  m.def("instruction_set", &gist::instruction_set,
        "The vector instruction set kernels use here: 'avx512', 'avx2' or 'portable'.");
  m.def("instruction_sets", &instruction_sets, "Those that can run here, widest first.");
  m.def(
      "use_instruction_set", &use_instruction_set,
      "Choose one of them for the whole process; ValueError names them where there is none such.");
  m.def("max_threads", &max_threads,
        "Threads an OpenMP region would use: torch.get_num_threads() once torch is loaded.");
  m.def("run_loss", &run_loss, "The loss kernels, as called by gist_kernels.kernels.cpu.loss.");
  m.def("run_attention", &run_attention,
        "The attention kernels, as called by gist_kernels.kernels.cpu.attention.");
  m.def("run_adapter", &run_adapter,
        "The adapter kernels, as called by gist_kernels.kernels.cpu.adapter.");
  m.def("run_activation", &run_activation,
        "The element-wise activation, as called by gist_kernels.kernels.cpu.activation.");
  m.attr("LOSS_STATS_PER_ROW") = gist::kRowStats;
}
