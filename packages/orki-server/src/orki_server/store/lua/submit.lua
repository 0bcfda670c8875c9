-- submit: a task comes into being, or is found by its idempotency key.
--
-- Sending the same submission again (same task id) changes nothing, so an answer that was lost may be asked for again.
-- -> new | same | conflict, task id, submitted (us)
OPS.submit = function(a)
  local id, method, request, opts, digest, key_digest, key, tp, tu, actor, contract = unpack(a)
  if redis.call('EXISTS', TASK .. id) == 1 then return { 'new', id, redis.call('HGET', TASK .. id, 'su') } end
  if key_digest ~= '' then
    local found = redis.call('GET', IDEMPOTENCY .. key_digest)
    local other = found and string.sub(found, 66)
    if found and redis.call('EXISTS', TASK .. other) == 1 then
      return { string.sub(found, 1, 64) == digest and 'same' or 'conflict', other, '0' }
    end
    redis.call('SET', IDEMPOTENCY .. key_digest, digest .. ' ' .. id)
  end
  local task = { id = id, s = QUEUED, m = method, o = opts, n = 0, k = key_digest, a = 0, f = '0', g = '', i = '',
    tp = tp, tu = tu, ap = '', rf = '', rg = '', lo = 0, le = 0, la = 0, ls = 0, lt = 0, lr = 0, lf = 0,
    h = contract }
  local total = options(task).total
  if total > 0 then task.lt = NOW + total end
  redis.call('HSET', TASK .. id, 'q', request, 'm', method, 'o', opts, 'k', key_digest, 'tp', tp, 'tu', tu,
    'su', whole(NOW_US), 'a', '0', 'f', '0', 'c', '0', 'd', '0', 'h', contract)
  redis.call('ZADD', INDEX, whole(NOW_US), id)
  redis.call('ZADD', QUEUE .. method, whole(NOW_US), id)
  count_open(task, 1)
  record(task, 'submitted', { text = key, number = #request, actor = actor })
  save(task, 's', 'n', 'lt')
  return { 'new', id, whole(NOW_US) }
end
