// Launches: the call of a kernel described once, in words, and made from Python tensors without Python code in between. For
// tensors of a few kilobytes the code around a kernel is what a call costs.
//
// A plan has one word per argument of the kernel, and one per tensor to allocate; fastgen/ops/_native.py explains them, and
// records, which are two launches that autograd knows, and chains, several in a row.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace fastgen {

namespace py = pybind11;

constexpr int MOST_ARGUMENTS = 48;

// Runs kernels and, while somebody asks, counts their seconds, by name.
class Watch {
 public:
  static Watch& get() {
    static Watch watch;
    return watch;
  }
  void run(const Kernel& kernel, const Argument* slots) {
    if (!on_) return kernel.entry(slots);
    const auto start = std::chrono::steady_clock::now();
    kernel.entry(slots);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    const std::lock_guard<std::mutex> lock(mutex_);
    seconds_[kernel.name] += taken.count();
  }
  // What has been counted; from now on it is counted from 0, or not at all.
  std::map<std::string, double> restart(bool on) {
    const std::lock_guard<std::mutex> lock(mutex_);
    on_ = on;
    return std::move(seconds_);
  }

 private:
  bool on_ = false;
  std::map<std::string, double> seconds_;
  std::mutex mutex_;
};

// Whom this thread tells of the kernels that it runs, null for nobody: fastgen/nn/replay.py writes them down, in a dispatch mode
// of torch that sees all else.
inline thread_local PyObject* listener = nullptr;

// Name and plan (null where the kernel was called as it is), arguments and outputs.
inline bool tell(const char* name, const char* plan, PyObject* const* args, Py_ssize_t count, PyObject* outputs) {
  const py::object given = py::reinterpret_steal<py::object>(PyTuple_New(count));
  for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SET_ITEM(given.ptr(), i, Py_NewRef(args[i]));
  PyObject* const done = PyObject_CallFunction(listener, "zzOO", name, plan, given.ptr(), outputs);
  Py_XDECREF(done);
  return done;
}

// DLPack's C exchange interface, by which torch describes a tensor without Python code; https://dmlc.github.io/dlpack.
namespace dlpack {

struct Tensor {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct Exchange {
  struct {
    uint32_t major, minor;
    void* previous;
  } header;
  void *allocate, *export_managed, *import_managed;
  int (*describe)(void* object, Tensor* out);  // 0, or -1 with a Python error set
  void* current_stream;
};

constexpr int32_t CPU = 1;
constexpr uint8_t INT = 0, FLOAT = 2, BFLOAT = 4;  // kDLInt, kDLFloat, kDLBfloat

}  // namespace dlpack

// What is asked of torch. Made on first use: importing the extension does not import torch.
struct Torch {
  PyObject *tensor, *parameter, *float32, *channels_last, *empty, *empty_like, *new_empty, *dtype_keyword, *image_keywords;
  PyObject *is_grad_enabled, *num_threads, *dispatch_modes, *transforms, *requires_grad, *saved_tensors, *save_for_backward;
  PyObject *set_materialize_grads, *remembered, *graph_is_kept, *hooks_of_saved;
  const dlpack::Exchange* exchange = nullptr;  // null where this torch has none

  static const Torch& get() {
    static const Torch torch;
    return torch;
  }

  // A torch.Tensor or torch.nn.Parameter, described; subclasses may be anything, and are not.
  bool describe(PyObject* object, dlpack::Tensor& out) const {
    const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return exchange && (type == tensor || type == parameter) && exchange->describe(object, &out) == 0;
  }

 private:
  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const auto take = [](py::object from, const char* name) { return py::object(from.attr(name)).release().ptr(); };
    tensor = take(torch, "Tensor");
    parameter = take(torch.attr("nn"), "Parameter");
    float32 = take(torch, "float32");
    channels_last = take(torch, "channels_last");
    empty = take(torch, "empty");
    empty_like = take(torch, "empty_like");
    is_grad_enabled = take(torch, "is_grad_enabled");
    dispatch_modes = take(torch.attr("_C"), "_len_torch_dispatch_stack");
    transforms = take(torch.attr("_C"), "_are_functorch_transforms_active");
    num_threads = take(torch, "get_num_threads");
    new_empty = PyUnicode_InternFromString("new_empty");
    requires_grad = PyUnicode_InternFromString("requires_grad");
    saved_tensors = PyUnicode_InternFromString("saved_tensors");
    save_for_backward = PyUnicode_InternFromString("save_for_backward");
    set_materialize_grads = PyUnicode_InternFromString("set_materialize_grads");
    remembered = PyUnicode_InternFromString("remembered");
    graph_is_kept = take(torch.attr("_C").attr("_autograd"), "_get_current_graph_task_keep_graph");
    hooks_of_saved = take(torch.attr("_C").attr("_autograd"), "_top_saved_tensors_default_hooks");
    dtype_keyword = py::make_tuple("dtype").release().ptr();
    image_keywords = py::make_tuple("dtype", "memory_format").release().ptr();
    if (!py::hasattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__")) return;
    const py::object capsule = torch.attr("Tensor").attr("__dlpack_c_exchange_api__");
    const auto* found = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!found) throw py::error_already_set();
    if (found->header.major == 1 && found->describe) exchange = found;
  }
};

// An owned reference that may be null.
using Ref = py::object;
inline Ref own(PyObject* object) { return py::reinterpret_steal<Ref>(object); }

inline void* address(const dlpack::Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

inline int64_t integer(PyObject* function) {
  const Ref value = own(PyObject_CallNoArgs(function));
  return value ? PyLong_AsLongLong(value.ptr()) : -1;
}

class Launch {
 public:
  // `kernels`: the kernel in each instruction set, in the order that use_isa() counts.
  Launch(std::vector<const Kernel*> kernels, const std::string& plan) : kernels_(std::move(kernels)), plan_(plan) {
    std::istringstream words(plan);
    for (std::string word; words >> word;) {
      const auto found = std::find(std::begin(WORDS), std::end(WORDS), word);
      const bool literal = word.find_first_not_of("0123456789") == std::string::npos;
      if (found == std::end(WORDS) && !literal) throw std::invalid_argument("unknown word in a plan: " + word);
      const auto kind = literal ? LITERAL : static_cast<Word>(found - std::begin(WORDS));
      if (literal) literals_.push_back(std::stoll(word));
      words_.push_back(kind);
      typed_ |= kind == DTYPE;
      either_layout_ |= kind == LAST;
      channels_last_ |= kind == OWN;
      image_ |= kind == HEIGHT;
      inputs_ += given_to(kind);
      slots_ += slots_of(kind);
    }
    if (slots_ != strlen(kernels_.at(0)->signature))
      throw std::invalid_argument(std::string("the plan does not fit the signature of ") + kernels_[0]->name);
  }

  // The outputs of the kernel, as a tuple. None where something is not plain, False where autograd has a gradient to record:
  // nothing has been done then.
  PyObject* operator()(PyObject* const* args, Py_ssize_t count, int isa) const {
    if (count != inputs_)
      return PyErr_Format(PyExc_TypeError, "%s takes %d arguments, got %zd", kernels_[0]->name, inputs_, count);
    Argument slots[MOST_ARGUMENTS];
    PyObject* made[MOST_ARGUMENTS];
    int outputs = 0;
    const Answer answer = isa >= 0 ? fill(args, slots, made, outputs) : LONG_WAY;
    if (answer == RECORD) Py_RETURN_FALSE;
    if (answer == LONG_WAY) {
      for (int i = 0; i < outputs; ++i) Py_XDECREF(made[i]);
      PyErr_Clear();  // whoever asked goes the long way, and meets the error there
      Py_RETURN_NONE;
    }
    Py_BEGIN_ALLOW_THREADS
    Watch::get().run(*kernels_[isa], slots);
    Py_END_ALLOW_THREADS
    PyObject* tuple = PyTuple_New(outputs);
    for (int i = 0; i < outputs; ++i) PyTuple_SET_ITEM(tuple, i, made[i]);
    if (listener && !tell(kernels_[0]->name, plan_.c_str(), args, count, tuple)) {
      Py_DECREF(tuple);
      return nullptr;
    }
    return tuple;
  }

  int inputs() const { return inputs_; }

 private:
  // What a word says, and how plans spell it. From LIKE to NUMBER the caller gives it.
  enum Word {
    DTYPE, ROWS, EVENT, CHANNELS, PIXELS, HEIGHT, WIDTH, LAST, OWN, BINS, THREADS, NONE, LITERAL,
    LIKE, LIKE_OR_NONE, BESIDE, BINNED, KNOTS, WIDE, ROW, WEIGHTS, HISTORY, TABLE4, TABLE5, KEY, PAIR1, PAIR2, GROUPS, GROUPED,
    PARTS1, PARTS2, NORM, BIAS, IMAGE, MEMORY, SIDE, OUTPUTS, DOUBLED, FLAG, NUMBER,
    NEW_LIKE, NEW_BINNED, NEW_KNOTS, NEW_WIDE, NEW_ROW, NEW_PAIR1, NEW_PAIR2, NEW_GROUPED, NEW_NORM, NEW_IMAGE, NEW_PARTS, FIRST,
  };
  static constexpr const char* WORDS[] = {
      "dtype", "rows", "event", "channels", "pixels", "height", "width", "last", "own", "bins", "threads", "null",  //
      "(literal)",  //
      "like", "like?", "beside", "binned", "knots", "wide", "row", "weights", "history", "table4", "table5", "key", "pair1",  //
      "pair2", "groups", "grouped", "parts1", "parts2", "norm", "bias", "image", "memory", "side", "outputs", "doubled",  //
      "flag", "number",  //
      ">like", ">binned", ">knots", ">wide", ">row", ">pair1", ">pair2", ">grouped", ">norm", ">image", ">parts", ">first",
  };

  enum Answer { LAUNCH, RECORD, LONG_WAY };

  // What the first tensor says about the others, and what those given say about those to allocate.
  struct Like {
    dlpack::Tensor tensor;
    int code = -1;
    int64_t rows = 0, event = 1, channels = 0, pixels = 1;  // channels: with those of the one beside it
    bool last = false;                                      // its channels lie last in memory
    int64_t image[4] = {}, side = 1;                        // the shape of the image that is made of it, and of tiles of that
    int64_t past = 0, bins = 0, groups = 0;  // past: how many tensors like it the history holds
    PyObject *binned = nullptr, *knots = nullptr, *const* pairs[2] = {};  // given
  };

  static int storage_code(const dlpack::Tensor& t) {
    if (t.dtype.lanes != 1) return -1;
    if (t.dtype.code == dlpack::FLOAT && t.dtype.bits == 32) return 0;  // the codes of simd.h
    if (t.dtype.code == dlpack::BFLOAT && t.dtype.bits == 16) return 1;
    if (t.dtype.code == dlpack::FLOAT && t.dtype.bits == 16) return 2;
    return -1;
  }

  static bool read(PyObject* object, dlpack::Tensor& out) {
    return Torch::get().describe(object, out) && out.device.type == dlpack::CPU;
  }

  // Whether the elements lie without gaps, in the order of the dimensions or with the second, the channels, after all others.
  static bool is_dense(const dlpack::Tensor& t, bool last) {
    int64_t dense = 1;
    for (int place = t.ndim - 1; place >= 0; --place) {
      const int dim = !last || place == 0 ? place : place == t.ndim - 1 ? 1 : place + 1;
      if (t.shape[dim] != 1 && t.strides && t.strides[dim] != dense) return false;
      dense *= t.shape[dim];
    }
    return true;
  }

  static bool is_like(Word word) { return word == LIKE || word == LIKE_OR_NONE; }
  static bool is_split(Word word) { return word == BINNED || word == KNOTS; }
  static bool is_table(Word word) { return word == TABLE4 || word == TABLE5; }
  static bool is_pair(Word word) { return word == PAIR1 || word == PAIR2; }
  static bool is_new_pair(Word word) { return word == NEW_PAIR1 || word == NEW_PAIR2; }
  // What is given otherwise (noise, weights, coefficients, gradients) is constant for autograd.
  static bool differentiable(Word word) {
    return is_like(word) || is_split(word) || word == HISTORY || is_pair(word) || is_of_image(word);
  }
  static bool is_of_image(Word word) { return word == BESIDE || word == NORM || word == BIAS || word == IMAGE; }
  static bool is_parts(Word word) { return word == PARTS1 || word == PARTS2; }
  static bool may_be_none(Word word) { return word != LIKE && !is_split(word) && !is_table(word) && word != GROUPED; }
  static int given_to(Word word) { return word < LIKE || word > NUMBER ? 0 : is_pair(word) ? 2 : 1; }
  static size_t slots_of(Word word) {
    if (is_pair(word)) return 3;
    const bool with_a_number = word == WEIGHTS || word == HISTORY || is_table(word) || word == KEY || word == BIAS;
    return with_a_number || is_parts(word) || is_new_pair(word) ? 2 : 1;
  }

  // Whether a tensor is what the word says.
  static bool fits(Word word, const dlpack::Tensor& t, const Like& like) {
    const dlpack::Tensor& first = like.tensor;
    if (word == KEY) {
      const bool one = t.ndim == 1 && t.shape[0] == 4, many = t.ndim == 2 && t.shape[0] == like.rows && t.shape[1] == 4;
      return t.dtype.code == dlpack::INT && t.dtype.bits == 64 && (one || many);
    }
    if (word == MEMORY) return true;
    const int code = storage_code(t);
    if (is_pair(word)) {
      const bool fit = word == PAIR1 ? t.ndim == 1 && t.shape[0] == like.channels
                                     : t.ndim == 2 && t.shape[0] == like.rows && t.shape[1] == like.channels;
      return fit && code >= 0;
    }
    if (code != (differentiable(word) ? like.code : 0)) return false;
    if (is_split(word)) {  // the first says how many bins there are
      const int64_t last = t.ndim ? t.shape[t.ndim - 1] : 0;
      const int64_t expected = word == KNOTS ? like.bins - 1 : like.bins ? like.bins : last;
      return t.ndim == first.ndim + 1 && last == expected && last > 0 &&
             std::equal(first.shape, first.shape + first.ndim, t.shape);
    }
    if (word == BESIDE)
      return t.ndim == first.ndim && t.shape[0] == like.rows && std::equal(t.shape + 2, t.shape + t.ndim, first.shape + 2);
    if (is_parts(word)) {
      const int64_t channels = word == PARTS1 ? first.shape[1] : like.channels - first.shape[1];
      return t.ndim == 4 && t.shape[0] == like.rows && t.shape[2] == 3 && t.shape[3] == channels;
    }
    if (word == NORM) return t.ndim == 3 && t.shape[0] == like.rows && t.shape[1] == 3 && t.shape[2] == like.channels;
    if (word == BIAS) {
      const bool many = t.ndim == 2 && (t.shape[0] == 1 || t.shape[0] == like.rows);
      const bool lies = !t.strides || t.strides[t.ndim - 1] == 1 || like.image[1] == 1;
      return (t.ndim == 1 || many) && lies && t.shape[t.ndim - 1] == like.image[1];
    }
    if (word == IMAGE) return t.ndim == 4 && std::equal(t.shape, t.shape + 4, like.image);
    if (word == GROUPED)
      return t.ndim == 3 && t.shape[0] == like.rows && t.shape[1] == like.groups && t.shape[2] == 3;
    if (word == HISTORY) return t.ndim == first.ndim + 1 && std::equal(first.shape, first.shape + first.ndim, t.shape + 1);
    if (is_table(word)) {
      const int64_t columns = word == TABLE4 ? 4 : 5 + like.past;
      return (t.ndim == 1 && t.shape[0] == columns) || (t.ndim == 2 && t.shape[0] == like.rows && t.shape[1] == columns);
    }
    if (word == WEIGHTS && t.ndim == 0) return true;
    if (word == ROW || word == WEIGHTS) return t.ndim == 1 && t.shape[0] == like.rows;
    return t.ndim == first.ndim && std::equal(t.shape, t.shape + t.ndim, first.shape);
  }

  bool start(PyObject* first, Like& like) const {
    const Torch& torch = Torch::get();
    if (integer(torch.dispatch_modes) != (listener ? 1 : 0)) return false;
    if (own(PyObject_CallNoArgs(torch.transforms)).ptr() != Py_False) return false;
    const dlpack::Tensor& t = like.tensor;
    if (!read(first, like.tensor) || t.ndim == 0) return false;
    like.last = channels_last_ || (either_layout_ && !is_dense(t, false));
    if (!is_dense(t, like.last) || (image_ && t.ndim != 4)) return false;
    like.code = storage_code(t);
    if (!typed_ && like.code != 0) return false;
    like.rows = t.shape[0];
    if (t.ndim > 1) like.channels = t.shape[1];
    for (int i = 2; i < t.ndim; ++i) like.pixels *= t.shape[i];
    like.event = t.ndim > 1 ? like.channels * like.pixels : 1;
    if (image_) std::copy(t.shape, t.shape + 4, like.image);
    return like.code >= 0;
  }

  static PyObject* allocate(Word word, PyObject* first, const Like& like) {
    const Torch& torch = Torch::get();
    if (word == NEW_BINNED || word == NEW_KNOTS)
      return PyObject_CallOneArg(torch.empty_like, word == NEW_KNOTS ? like.knots : like.binned);
    const bool float32 = like.code == 0;
    if (word == NEW_LIKE || (word == NEW_WIDE && float32)) return PyObject_CallOneArg(torch.empty_like, first);
    if (word == NEW_WIDE) {
      PyObject* const args[] = {first, torch.float32};
      return PyObject_Vectorcall(torch.empty_like, args, 1, torch.dtype_keyword);
    }
    const auto sized = [&](PyObject* from, const int64_t* sizes, int count) {
      Ref held[4];
      PyObject* args[7] = {from};
      for (int i = 0; i < count; ++i) args[1 + i] = (held[i] = own(PyLong_FromLongLong(sizes[i]))).ptr();
      args[1 + count] = torch.float32, args[2 + count] = torch.channels_last;
      if (!from) return PyObject_Vectorcall(torch.empty, args + 1, (size_t)count, torch.image_keywords);
      return PyObject_VectorcallMethod(torch.new_empty, args, (size_t)count + 1, float32 ? nullptr : torch.dtype_keyword);
    };
    if (word == NEW_IMAGE) return sized(nullptr, like.image, 4);
    const int64_t grouped[] = {like.rows, like.groups, 3}, norm[] = {like.rows, 3, like.channels};
    const int64_t parts[] = {like.rows, (like.image[2] + like.side - 1) / like.side, 3, like.image[1]};
    if (word == NEW_PARTS) return sized(first, parts, 4);
    return sized(first, word == NEW_NORM ? norm : grouped, word == NEW_ROW ? 1 : 3);
  }

  // A null pointer for None; false where there is no tensor.
  static bool memory_of(PyObject* tensor, Argument& slot) {
    dlpack::Tensor t{};
    if (!tensor || (tensor != Py_None && !Torch::get().describe(tensor, t))) return false;
    slot.pointer = address(t);
    return true;
  }

  Answer fill(PyObject* const* args, Argument* slot, PyObject** made, int& outputs) const {
    const Torch& torch = Torch::get();
    Like like;
    if (!start(args[0], like)) return LONG_WAY;
    const bool enabled = own(PyObject_CallNoArgs(torch.is_grad_enabled)).ptr() != Py_False;
    bool record = false;
    // Whether what is given for a word may be; None leaves the tensor as it is.
    const auto accept = [&](Word word, PyObject* given, dlpack::Tensor& t) {
      if (given == Py_None) return may_be_none(word);
      const bool last = like.last && (is_like(word) || word == WIDE || word == BESIDE || word == IMAGE);
      if (!read(given, t) || (word != BIAS && !is_dense(t, last)) || !fits(word, t, like)) return false;
      record |= enabled && differentiable(word) && own(PyObject_GetAttr(given, torch.requires_grad)).ptr() != Py_False;
      return true;
    };
    PyObject* const* given = args;
    for (const Word word : words_) {
      if (word == FLAG) slot->integer = PyObject_IsTrue(*given);
      else if (word == NUMBER) {
        slot->real = PyFloat_AsDouble(*given);
        if (slot->real == -1.0 && PyErr_Occurred()) return LONG_WAY;
      } else if (word == GROUPS) {
        slot->integer = like.groups = PyLong_CheckExact(*given) ? PyLong_AsLongLong(*given) : 0;
        if (like.groups < 1 || like.channels == 0 || like.channels % like.groups) return LONG_WAY;
      } else if (word == OUTPUTS || word == SIDE) {
        slot->integer = PyLong_AsLongLong(*given);
        if (slot->integer < 1) return LONG_WAY;
        (word == OUTPUTS ? like.image[1] : like.side) = slot->integer;
      } else if (word == DOUBLED) {
        slot->integer = PyObject_IsTrue(*given);
        like.image[2] <<= slot->integer, like.image[3] <<= slot->integer;
      } else if (is_pair(word)) {
        dlpack::Tensor first{}, second{};
        if (!accept(word, given[0], first) || !accept(word, given[1], second)) return LONG_WAY;
        const int code = storage_code(first), other = storage_code(second);  // -1 for None
        if (code != other && code >= 0 && other >= 0) return LONG_WAY;
        slot[0].integer = std::max({code, other, 0});
        slot[1].pointer = address(first), slot[2].pointer = address(second);
        like.pairs[word == PAIR2] = given;
      } else if (given_to(word)) {
        dlpack::Tensor t{};
        if (!accept(word, *given, t)) return LONG_WAY;
        slot[0].pointer = address(t);
        if (word == BINNED) like.bins = t.shape[t.ndim - 1], like.binned = *given;
        if (word == KNOTS) like.knots = *given;
        if (is_parts(word)) slot[1].integer = t.ndim ? t.shape[1] : 0;
        if (word == BESIDE && t.ndim) like.channels += t.shape[1];
        if (word == BIAS) slot[1].integer = t.ndim < 2 || t.shape[0] == 1 ? 0 : t.strides ? t.strides[0] : like.image[1];
        if (word == KEY) slot[1].integer = t.ndim == 2 ? like.rows : t.ndim;
        if (word == WEIGHTS) slot[1].integer = t.ndim;
        if (word == HISTORY) slot[1].integer = like.past = t.ndim ? t.shape[0] : 0;
        if (is_table(word)) slot[1].integer = t.ndim == 2 ? t.shape[1] : 0;
      }
      given += given_to(word);
      slot += slots_of(word);
    }
    if (record) return RECORD;
    slot -= slots_;
    const int64_t* literal = literals_.data();
    for (const Word word : words_) {
      switch (word) {
        case DTYPE: slot->integer = like.code; break;
        case ROWS: slot->integer = like.rows; break;
        case EVENT: slot->integer = like.event; break;
        case BINS: slot->integer = like.bins; break;
        case THREADS: slot->integer = integer(torch.num_threads); break;
        case CHANNELS: slot->integer = like.channels; break;
        case PIXELS: slot->integer = like.pixels; break;
        case HEIGHT: slot->integer = like.tensor.shape[2]; break;
        case WIDTH: slot->integer = like.tensor.shape[3]; break;
        case OWN: slot->integer = like.tensor.shape[1]; break;
        case LAST: slot->integer = like.last ? like.channels : 0; break;
        case NONE: slot->pointer = nullptr; break;
        case LITERAL: slot->integer = *literal++; break;
        case NEW_PAIR1:
        case NEW_PAIR2:
          for (int i = 0; i < 2; ++i) {
            PyObject* const given = like.pairs[word == NEW_PAIR2][i];
            made[outputs] = given == Py_None ? Py_NewRef(given) : PyObject_CallOneArg(torch.empty_like, given);
            if (!memory_of(made[outputs++], slot[i])) return LONG_WAY;
          }
          break;
        case NEW_LIKE:
        case NEW_BINNED:
        case NEW_KNOTS:
        case NEW_WIDE:
        case NEW_ROW:
        case NEW_GROUPED:
        case NEW_NORM:
        case NEW_IMAGE:
        case NEW_PARTS:
          made[outputs] = allocate(word, args[0], like);
          if (!memory_of(made[outputs++], *slot)) return LONG_WAY;
          break;
        case FIRST:
          made[outputs++] = Py_NewRef(args[0]);
          slot->pointer = address(like.tensor);
          break;
        default: break;
      }
      slot += slots_of(word);
    }
    return LAUNCH;
  }

  std::vector<const Kernel*> kernels_;
  std::string plan_;
  std::vector<Word> words_;
  std::vector<int64_t> literals_;
  int inputs_ = 0;
  size_t slots_ = 0;
  bool typed_ = false, either_layout_ = false, channels_last_ = false, image_ = false;
};

// Launches one after the other, without Python code in between, each given arguments of the whole and outputs of those before.
class Chain {
 public:
  // `takes`, of each launch: "a0" the first argument of the chain, "r1" the first output of its second launch, "s1" the second;
  // true, false, none.
  Chain(std::vector<Launch> launches, const std::vector<std::string>& takes) : launches_(std::move(launches)) {
    for (size_t i = 0; i < launches_.size(); ++i) {
      takes_.emplace_back();
      std::istringstream words(takes.at(i));
      for (std::string word; words >> word;) {
        const bool constant = word == "none" || word == "true" || word == "false";
        takes_[i].push_back({word[0], constant ? 0 : std::stoi(word.substr(1))});  // none, true, false: n, t, f
        if (word[0] == 'a') inputs_ = std::max(inputs_, takes_[i].back().second + 1);
        if ((word[0] == 'r' || word[0] == 's') && takes_[i].back().second >= (int)i) throw std::invalid_argument("not yet there: " + word);
      }
      if (launches_[i].inputs() != (int)takes_[i].size()) throw std::invalid_argument("a chain does not fit its launches");
    }
  }

  // The outputs of the last launch, as a tuple; None where something is not plain or has gradients.
  PyObject* operator()(PyObject* const* args, Py_ssize_t count, int isa) const {
    if (count != inputs_) return PyErr_Format(PyExc_TypeError, "a chain takes %d arguments, got %zd", inputs_, count);
    std::vector<Ref> made;
    for (size_t i = 0; i < launches_.size(); ++i) {
      PyObject* given[MOST_ARGUMENTS];
      for (size_t k = 0; k < takes_[i].size(); ++k) {
        const auto [kind, index] = takes_[i][k];
        given[k] = kind == 'a'   ? args[index]
                   : kind == 'r' ? PyTuple_GET_ITEM(made[index].ptr(), 0)
                   : kind == 's' ? PyTuple_GET_ITEM(made[index].ptr(), 1)
                   : kind == 't' ? Py_True
                   : kind == 'f' ? Py_False
                                 : Py_None;
      }
      made.push_back(own(launches_[i](given, (Py_ssize_t)takes_[i].size(), isa)));
      if (!made.back()) return nullptr;
      if (!PyTuple_Check(made.back().ptr())) Py_RETURN_NONE;
    }
    return made.back().release().ptr();
  }

 private:
  std::vector<Launch> launches_;
  std::vector<std::vector<std::pair<char, int>>> takes_;
  int inputs_ = 0;
};

// A torch.autograd.Function made of launches, so that no Python code runs between PyTorch and the kernels: one where there is
// nothing to record, one for the forward pass of a graph, which may keep more, and two for its backward pass: `final` runs
// where the graph is not kept for another, so that it may write over what was saved.
class Record {
 public:
  // `takes`: what the backward launch is given: "i0" the first argument of the forward launch, "o2" its third output, "g1" the
  // gradient of its second; "n3" its fourth argument, a number. `gives`: what the gradients of the forward launch's arguments
  // are, in order: "o0" the first output of the backward launch, "g0" a gradient as it came. `returns`: the outputs that the
  // caller sees.
  Record(Launch plain, Launch forward, Launch backward, Launch final, int returns, const std::string& takes,
         const std::string& gives)
      : plain_(std::move(plain)),
        forward_(std::move(forward)),
        backward_(std::move(backward)),
        final_(std::move(final)),
        returns_(returns),
        takes_(places(takes)),
        gives_(places(gives)) {
    if (plain_.inputs() != forward_.inputs() || backward_.inputs() != (int)takes_.size() ||
        final_.inputs() != backward_.inputs())
      throw std::invalid_argument("the launches of a record do not fit each other");
    for (const Place& place : takes_) numbers_ += place.kind == 'n';
  }

  // `apply` of the class that has forward() and backward(), and who takes over in the backward pass what is not plain.
  void complete(py::object apply, py::object longer) { apply_ = std::move(apply), longer_ = std::move(longer); }

  // The outputs, recorded where gradients are wanted; None where something is not plain, and nothing has been done.
  PyObject* attempt(PyObject* const* args, Py_ssize_t count, int isa) const {
    PyObject* made = plain_(args, count, isa);
    if (made != Py_False) return made;
    Py_DECREF(made);
    return PyObject_Vectorcall(apply_.ptr(), args, (size_t)count, nullptr);
  }

  PyObject* forward(PyObject* const* args, Py_ssize_t count, int isa) const {
    PyObject* const context = args[0];
    const Ref outputs = own(forward_(args + 1, count - 1, isa));
    if (!outputs) return nullptr;
    if (!PyTuple_Check(outputs.ptr())) {
      PyErr_SetString(PyExc_RuntimeError, "a launch was interrupted: the instruction set or a mode changed meanwhile");
      return nullptr;
    }
    PyObject* saved[MOST_ARGUMENTS + 1] = {context};
    int count_saved = 1;
    for (const Place& place : takes_)
      if (place.kind == 'i' || place.kind == 'o')
        saved[count_saved++] = place.kind == 'i' ? args[1 + place.index] : item(outputs, place.index);
    const Torch& torch = Torch::get();
    PyObject* const never[] = {context, Py_False};
    if (!own(PyObject_VectorcallMethod(torch.save_for_backward, saved, count_saved, nullptr)) ||
        !own(PyObject_VectorcallMethod(torch.set_materialize_grads, never, 2, nullptr)) || !remember(context, args + 1))
      return nullptr;
    return PyTuple_GetSlice(outputs.ptr(), 0, returns_);
  }

  PyObject* backward(PyObject* const* args, Py_ssize_t count, int isa) const {
    const Torch& torch = Torch::get();
    if (own(PyObject_CallNoArgs(torch.is_grad_enabled)).ptr() != Py_False) return later(args, count);
    const Ref saved = own(PyObject_GetAttr(args[0], torch.saved_tensors));
    if (!saved) return nullptr;
    const Ref remembered = own(PyObject_GetAttr(args[0], torch.remembered));
    if (!remembered) return nullptr;
    PyObject* given[MOST_ARGUMENTS];
    int next = 0, next_number = 0;
    for (size_t i = 0; i < takes_.size(); ++i) {
      if (takes_[i].kind == 'g') given[i] = args[1 + takes_[i].index];
      else given[i] = takes_[i].kind == 'n' ? item(remembered, next_number++) : item(saved, next++);
    }
    const bool last = item(remembered, numbers_) == Py_True && own(PyObject_CallNoArgs(torch.graph_is_kept)).ptr() == Py_False;
    const Ref outputs = own((last ? final_ : backward_)(given, (Py_ssize_t)takes_.size(), isa));
    if (!outputs || !PyTuple_Check(outputs.ptr())) return outputs ? later(args, count) : nullptr;
    PyObject* gradients = PyTuple_New(forward_.inputs());
    for (int i = 0; i < forward_.inputs(); ++i) {
      PyObject* gradient = Py_None;
      if (i < (int)gives_.size()) gradient = gives_[i].kind == 'g' ? args[1 + gives_[i].index] : item(outputs, gives_[i].index);
      PyTuple_SET_ITEM(gradients, i, Py_NewRef(gradient));
    }
    return gradients;
  }

 private:
  struct Place {
    char kind;
    int index;
  };

  static std::vector<Place> places(const std::string& text) {
    std::vector<Place> out;
    std::istringstream words(text);
    for (std::string word; words >> word;) out.push_back({word[0], std::stoi(word.substr(1))});
    return out;
  }

  static PyObject* item(const Ref& tuple, int index) { return PyTuple_GET_ITEM(tuple.ptr(), index); }

  // On the context: the numbers that the backward pass needs, and whether what is saved is nobody else's. Hooks may hold it.
  bool remember(PyObject* context, PyObject* const* args) const {
    const Torch& torch = Torch::get();
    const Ref hooks = own(PyObject_CallOneArg(torch.hooks_of_saved, Py_False));
    const Ref tuple = own(PyTuple_New(numbers_ + 1));
    if (!hooks || !tuple) return false;
    int next = 0;
    for (const Place& place : takes_)
      if (place.kind == 'n') PyTuple_SET_ITEM(tuple.ptr(), next++, Py_NewRef(args[place.index]));
    PyTuple_SET_ITEM(tuple.ptr(), next, Py_NewRef(hooks.is_none() ? Py_True : Py_False));
    return PyObject_SetAttr(context, torch.remembered, tuple.ptr()) == 0;
  }

  PyObject* later(PyObject* const* args, Py_ssize_t count) const {
    return PyObject_Vectorcall(longer_.ptr(), args, (size_t)count, nullptr);
  }

  Launch plain_, forward_, backward_, final_;
  int returns_, numbers_ = 0;
  std::vector<Place> takes_, gives_;
  py::object apply_, longer_;
};

}  // namespace fastgen
